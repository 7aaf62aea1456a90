"""Fixtures for several files. Tests on real CIFAR-10 use `cifar10_dir`, which CIFAR10_DIR names; without it they skip."""
import os
import subprocess
import sys
from pathlib import Path

# The nets of the tests are tiny: a second thread gains nothing, and costs tenfold where another program has the cores (OpenMP's
# threads then spin for one another). Programs that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from seresnet.imageset import Split


ROOT = Path(__file__).parents[1]
COLOURS = ("cat", "dog", "emu, tall")    # the classes of `run`


def run_module(name, cwd, *arguments):
    """(exit status, output, errors) of `python -m seresnet.<name>`, run in `cwd`."""
    done = subprocess.run([sys.executable, "-m", f"seresnet.{name}", *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                          timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    folder = os.environ.get("CIFAR10_DIR")
    if not folder:
        pytest.skip("CIFAR10_DIR is not set: make test CIFAR10_DIR=<folder with cifar-10-batches-bin or -py>")
    return Path(folder)


@pytest.fixture(scope="session")
def make_split():
    """make_split(n, side, classes, seed) -> Split of random images, every class present."""
    def make(count: int = 60, side: int = 8, classes: int = 3, seed: int = 0) -> Split:
        rng = np.random.default_rng(seed)
        return Split(rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8), (np.arange(count) % classes).astype(np.int64))
    return make


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run folder of a tiny net that has learned to tell three colours, its test split, its report."""
    from seresnet import config, loop
    from seresnet.beton import write_beton
    root, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)

    def split(count):
        labels = np.arange(count) % 3
        images = rng.integers(0, 90, (count, 16, 16, 3))
        images[np.arange(count), :, :, labels] += 40
        return Split(images.astype(np.uint8), labels)
    test = split(60)
    for name, part in (("train", split(240)), ("test", test)):
        write_beton(root / f"{name}.beton", part, classes=COLOURS, name="colours", source="a test", fingerprint="f")
    settings = config.build({
        "beton": {"train": str(root / "train.beton"), "test": str(root / "test.beton")}, "run": {"folder": str(root / "run")},
        "model": {"blocks": [1, 1], "channels": [8], "classes": 0, "image_size": 0, "se": "block", "se_reduction": 4},
        "loader": {"batch_size": 24}, "optim": {"lr": 0.1}, "loop": {"epochs": 3}})
    outcome = loop.fit(settings, ["a test"])
    assert outcome["accuracy_tta"] > 0.6
    return root / "run", test, outcome
