"""Fixtures for several files. Tests on real CIFAR-10 use `cifar10_dir`, which CIFAR10_DIR names; without it they skip."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

# The nets of the tests are tiny: a second thread gains nothing, and costs tenfold where another program has the cores (OpenMP's
# threads then spin for one another). Programs that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

# Without a GPU Triton's kernels are interpreted, with NumPy on the CPU. Triton asks when it is first imported, and torch's compiler imports it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from seresnet.imageset import Split


ROOT = Path(__file__).parents[1]
COLOURS = ("cat", "dog", "emu, tall")    # the classes of `run`


def run_module(name, cwd, *arguments):
    """(exit status, output, errors) of `python -m seresnet.<name>`, run in `cwd`."""
    done = subprocess.run([sys.executable, "-m", f"seresnet.{name}", *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                          timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)})
    return done.returncode, done.stdout, done.stderr


def start_child(work, user=0):
    """Run `work()` in a forked process, as the user `user` where that is not 0: its limits, its rights and its death are its own.
    Returns a function that waits for what it gives, as text, or `<kind of exception>: <its text>`."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if user:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            text = str(work())
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        os.write(writing, text.encode()[:60_000])
        os._exit(0)
    os.close(writing)

    def wait():
        with open(reading, encoding="utf-8") as pipe:
            text = pipe.read()
        os.waitpid(child, 0)
        return text
    return wait


def in_child(work, user=0):
    """What `start_child` gives, waited for."""
    return start_child(work, user)()


def killed(work, seconds):
    """Run `work()` in a forked process and kill it after `seconds`."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(mebibytes, *options) -> a folder on a disk of its own. Skips where none may be mounted."""
    mounted = []

    def mount(mebibytes, *options):
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join([f"size={mebibytes}m", *options]), "tmpfs", place],
                              capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no disk may be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place
    try:
        yield mount
    finally:
        for place in mounted:
            subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def quick_disk(tmp_path):
    """A folder in memory where one may be mounted: a test that writes hundreds of files need not wait for a disk to sync them."""
    place = tmp_path / "quick"
    place.mkdir()
    there = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", place], capture_output=True).returncode == 0
    try:
        yield place
    finally:
        if there:
            subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def faults(record_property):
    """faults(count): this test injects so many faults. What counts them reads it from pytest's XML (benchmarks/faults.py)."""
    return lambda count: record_property("faults", count)


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    folder = os.environ.get("CIFAR10_DIR")
    if not folder:
        pytest.skip("CIFAR10_DIR is not set: make test CIFAR10_DIR=<folder with cifar-10-batches-bin or -py>")
    return Path(folder).resolve()    # tests run programs elsewhere


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


@pytest.fixture
def numba_passes():
    """The compiled passes, seresnet/compiled.py; without them the test skips."""
    from seresnet import compiled
    if compiled.passes() is None:
        pytest.skip("no numba here whose threads could be used")
    return compiled.passes()


@pytest.fixture(params=["numba", "triton"])
def compiled_for(request, monkeypatch):
    """The device that the test's tensors are to be on, with the passes for it: numba's on the CPU, Triton's on a GPU, or interpreted on the
    CPU where there is none. compiled_for.kind says which passes."""
    from seresnet import compiled
    device = torch.device("cpu")
    if request.param == "numba":
        request.getfixturevalue("numba_passes")
    elif torch.cuda.is_available():
        device = torch.device("cuda")
        monkeypatch.setattr(compiled, "_triton_is_wanted", True)
        assert compiled.passes_on_a_gpu(torch.device("cuda", 0)) is not None
    else:
        pytest.importorskip("triton")
        from seresnet import gpu_kernels
        monkeypatch.setattr(compiled, "passes", lambda: gpu_kernels)
    return SimpleNamespace(device=device, kind=request.param)


@pytest.fixture
def calls_of(request, monkeypatch):
    """Small batches take the compiled way, too; calls_of(function) is the list of what that autograd function is called with. For the
    passes of `compiled_for`, or numba's."""
    from seresnet import compiled
    request.getfixturevalue("compiled_for" if "compiled_for" in request.fixturenames else "numba_passes")

    def watch(function):
        calls, apply = [], function.apply
        monkeypatch.setattr(function, "apply", lambda *arguments: calls.append(arguments) or apply(*arguments))
        return calls
    monkeypatch.setattr(compiled, "LEAST", 0)
    return watch
