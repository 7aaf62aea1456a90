"""Fixtures for several files. Tests on real CIFAR-10 use `cifar10_dir`, which CIFAR10_DIR names; without it they skip."""
import os
from pathlib import Path

import numpy as np
import pytest

from seresnet.sources import Split


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
