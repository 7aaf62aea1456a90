"""The README's examples, run verbatim: a user's own folder from images to predictions, and all that can be done with the net."""
import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seresnet import config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")


def examples(section):
    """The code blocks of a section: (language, text)."""
    text = re.search(rf"## {section}\n(.*?)(?=\n## )", README, re.S)[1]
    return re.findall(r"```(\w*)\n(.*?)```", text, re.S)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of the programs, a folder of 7 classes of 64x64 images (told apart by colour and a stripe), and new ones."""
    root = tmp_path_factory.mktemp("readme")
    for name in ("seresnet", "rn_configs", "benchmarks"):
        shutil.copytree(ROOT / name, root / name)    # with what numba has compiled so far
    for name in ("write_datasets.py", "ffcv_train.py", "README.md"):
        shutil.copy(ROOT / name, root / name)
    (root / "tools").mkdir()
    (root / "tools/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (root / "tools/python").chmod(0o755)
    rng = np.random.default_rng(0)

    def picture(c):
        image = rng.integers(0, 60, (64, 64, 3)) + np.array([c * 25, 90, 170 - c * 25])
        image[8 * c:8 * c + 8] = rng.integers(150, 250)
        return Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    for c, name in enumerate(CLASSES):
        (root / "pets" / name).mkdir(parents=True)
        for i in range(12):
            picture(c).save(root / "pets" / name / f"{i}.{'png' if i % 2 else 'jpg'}")
    (root / "new_pets").mkdir()
    for i in range(14):
        picture(i % 7).save(root / "new_pets" / f"{i}.png")
    return root


def shell(place, text):
    environment = {**os.environ, "PATH": f"{place / 'tools'}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-e", "-c", text], cwd=place, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_own_images_from_a_folder_to_predictions_in_three_commands(place):
    [(_, text)] = examples("Your own images")
    assert len(text.strip().splitlines()) == 3
    output = shell(place, text)
    assert "image folder pets" in output and "7 classes" in output
    rows = list(csv.reader((place / "predictions.csv").read_text().splitlines()))
    assert rows[0] == ["ID", "Labels"] and [row[0] for row in rows[1:]] == [str(i) for i in range(14)]
    right = sum(row[1] == CLASSES[int(row[0]) % 7] for row in rows[1:])
    assert right >= 12, rows


def test_what_to_do_with_a_trained_net(place):
    assert (place / "runs/pets/weights.pt").exists(), "the test before this one trains the net"
    for language, text in examples("What to do with a trained net"):
        if language == "python":
            shell(place, f"python - <<'END'\nimport numpy as np\nimages = np.zeros((5, 64, 64, 3), np.uint8)\n{text}\n"
                         "assert labels.shape == (5,) and len(net.classes) == 7 and len(new.ids) == 14 and told['accuracy'] > 0.5\nEND\n")
        else:
            shell(place, text)
    for name in ("proba.csv", "runs.csv", "runs.png", "preview.png", "runs/pets/model.pt2", "pets.onnx", "runs/pets/model.onnx",
                 "runs/pets/evaluation/own_test/evaluation.json", "runs/pets/evaluation/own_test/shift.png"):
        assert (place / name).stat().st_size > 0, name


def test_every_command_of_the_readme_is_understood(place, monkeypatch):
    """The long ones too, as far as their command line goes."""
    lines = [line.partition("#")[0].strip() for section in ("Start", "What a run leaves", "Other data sets", "How fast is it") for language, text in
             examples(section) for line in text.splitlines()]
    programs = [line for line in lines if line.startswith("python ")]
    assert len(programs) >= 6
    for line in programs:
        words = shlex.split(re.sub(r"runs/se94-\S+", "runs/pets", line))[1:]
        if words[0] in ("ffcv_train.py", "write_datasets.py"):
            monkeypatch.chdir(place)
            config.parse(words[1:])    # every key known, every value allowed
        else:
            usage = shell(place, f"python {' '.join(words[:2])} --help")
            unknown = [word for word in " ".join(words[2:]).split() if word.startswith("--") and not re.search(rf"{word}\b", usage)]
            assert "--config-file" in usage or words[1] in ("seresnet.doctor", "seresnet.predict", "benchmarks.frontier", "benchmarks.convolutions"), line
            assert usage.startswith("usage: ") and not unknown, line
