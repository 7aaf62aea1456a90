"""What macOS and Windows lack is not needed, as far as Linux can be made to lack it; text is UTF-8 wherever it is written."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="takes from Linux what it looks up in /proc")
def test_a_training_and_what_follows_it_work_elsewhere(tmp_path):
    rng = np.random.default_rng(0)
    for c, name in enumerate(("cat", "dog", "emü")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(30):
            image = rng.integers(0, 90, (16, 16, 3))
            image[:, :, c] += 60
            Image.fromarray(image.astype(np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    done = subprocess.run([sys.executable, "-X", "utf8=0", "-X", "warn_default_encoding", ROOT / "tests/elsewhere.py", tmp_path],
                          capture_output=True, encoding="cp1252", timeout=200,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp1252", "LC_ALL": "C.UTF-8"})
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["accuracy"] == told["again"] > 0.6 and told["predicted"] == 2
    assert "emü" in (tmp_path / "run/evaluation/test/evaluation.json").read_text(encoding="utf-8").encode().decode("unicode_escape")
    assert {path.name for path in tmp_path.iterdir()} >= {"p.csv", "runs.png", "runs.csv"}
