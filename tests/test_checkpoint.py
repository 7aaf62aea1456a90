"""checkpoint: whole files or the old ones, and nothing in them that could run."""
import os
import pickle
import random
import re
import resource
import stat
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import in_child, killed
from seresnet import checkpoint
from seresnet.checkpoint import CheckpointError


def state(value=1.0):
    return {"model": {"w": torch.full((50, 50), value), "n": torch.tensor(3)}, "names": ["a", "b"], "epoch": 2,
            "rate": 0.5, "nothing": None, "flag": True}


def test_what_is_saved_comes_back(tmp_path):
    checkpoint.save(tmp_path / "w.pt", state())
    got = checkpoint.load(tmp_path / "w.pt")
    assert torch.equal(got["model"]["w"], state()["model"]["w"])
    assert {k: v for k, v in got.items() if k != "model"} == {k: v for k, v in state().items() if k != "model"}
    assert os.listdir(tmp_path) == ["w.pt"]


def test_the_mode_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        checkpoint.save(tmp_path / "w.pt", state())
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(tmp_path / "w.pt").st_mode) == 0o640


@pytest.mark.parametrize("bad, where", [(object(), "state.x"), ([1, (2,)], r"state.x\[1\]"), ({"y": {3}}, "state.x.y"),
                                        (torch.nn.Linear(1, 1), "state.x"), ({1.5: 0}, "state.x")])
def test_only_tensors_and_plain_values_are_saved(tmp_path, bad, where):
    checkpoint.save(tmp_path / "w.pt", state())
    before = (tmp_path / "w.pt").read_bytes()
    with pytest.raises(ValueError, match=where):
        checkpoint.save(tmp_path / "w.pt", {"x": bad})
    assert (tmp_path / "w.pt").read_bytes() == before and os.listdir(tmp_path) == ["w.pt"]


def test_a_failure_while_writing_leaves_the_old_file_alone(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "w.pt", state())
    before = (tmp_path / "w.pt").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="w.pt: cannot be written .No space left"):
        checkpoint.save(tmp_path / "w.pt", state(2.0))
    assert (tmp_path / "w.pt").read_bytes() == before and os.listdir(tmp_path) == ["w.pt"]


def test_a_limit_on_the_size_of_files_leaves_the_old_file(quick_disk, faults):
    checkpoint.save(quick_disk / "w.pt", state())
    before = (quick_disk / "w.pt").read_bytes()

    def limited(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        checkpoint.save(quick_disk / "w.pt", {"w": torch.zeros(100000)})
    for size in (0, 100, 5000, 399_000):
        assert re.match("CheckpointError: .*w.pt: cannot be written", in_child(lambda: limited(size)))
        assert (quick_disk / "w.pt").read_bytes() == before and os.listdir(quick_disk) == ["w.pt"]
    faults(4)


def test_a_small_disk_that_fills_up_leaves_the_old_file(small_disk):
    place = small_disk(1)
    checkpoint.save(place / "w.pt", state())
    before = (place / "w.pt").read_bytes()
    with pytest.raises(CheckpointError, match="w.pt: cannot be written"):
        checkpoint.save(place / "w.pt", {"w": torch.zeros(1_000_000)})
    assert (place / "w.pt").read_bytes() == before and os.listdir(place) == ["w.pt"]
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    with pytest.raises(CheckpointError, match="w.pt: cannot be written .Read-only file system"):
        checkpoint.save(place / "w.pt", state(2.0))
    assert (place / "w.pt").read_bytes() == before


def test_a_folder_without_the_right_to_write_is_named(tmp_path):
    folder = Path(tempfile.mkdtemp())    # pytest's own folders are closed to others altogether
    try:
        folder.chmod(0o555)
        text = in_child(lambda: checkpoint.save(folder / "w.pt", state()), 65534 if os.geteuid() == 0 else 0)
        assert re.match("CheckpointError: .*w.pt: cannot be written .Permission denied", text) and os.listdir(folder) == []
    finally:
        folder.rmdir()


def test_a_disk_that_is_full_loses_nothing_that_was_saved(tmp_path, monkeypatch):
    """And it is told how to go on from that, not to begin again elsewhere."""
    def full(*_):
        raise OSError(28, "No space left on device")
    checkpoint.save(tmp_path / "best.pt", {"a": 1})
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match="free space there, or choose another folder with --run.folder"):
        checkpoint.save(tmp_path / "best.pt", {"a": 2})
    monkeypatch.undo()
    checkpoint.save(tmp_path / "last.pt", {"a": 1})
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=f"free space there, then go on from what was saved before: --run.resume {tmp_path}$"):
        checkpoint.save(tmp_path / "best.pt", {"a": 2})


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere/w.pt: cannot be written"):
        checkpoint.save(tmp_path / "nowhere" / "w.pt", state())


def test_killed_at_any_moment_the_file_is_whole(quick_disk, faults):
    path, rng = quick_disk / "w.pt", random.Random(0)

    def save():
        for i in range(10**6):
            checkpoint.save(path, {"w": torch.full((200000,), float(i))})
    left = set()
    for _ in range(50):
        assert killed(save, rng.uniform(0.001, 0.03))
        if path.exists():
            assert len(checkpoint.load(path)["w"].unique()) == 1
        left |= set(os.listdir(quick_disk)) - {"w.pt"}
        assert len(set(os.listdir(quick_disk)) - {"w.pt"}) <= 1, "each clears what those before it left"
    assert left, "some were killed in the middle of a file"
    checkpoint.save(path, state())
    assert os.listdir(quick_disk) == ["w.pt"]
    faults(50)


def test_temporary_files_of_the_living_are_left_alone(tmp_path):
    living, dead = tmp_path / f".w.pt.tmp-{os.getppid()}", tmp_path / f".w.pt.tmp-{2**22 + 1}"    # above the largest process number
    for file in (living, dead):
        file.write_bytes(b"half")
    checkpoint.save(tmp_path / "w.pt", state())
    assert living.exists() and not dead.exists()


def damaged(path, kind):
    checkpoint.save(path, state())
    whole = path.read_bytes()
    contents = {"empty": b"", "text": b"hello", "foreign": pickle.dumps({"format": 1}), "half": whole[:len(whole) // 2],
                "tenth": whole[:len(whole) // 10], "almost": whole[:-20]}
    path.write_bytes(contents[kind])


@pytest.mark.parametrize("kind", ["empty", "text", "foreign", "half", "tenth", "almost"])
def test_damaged_and_foreign_files_end_in_one_error(tmp_path, kind):
    damaged(tmp_path / "w.pt", kind)
    if kind == "foreign":    # a plain pickle of a plain dict is harmless; it is read, or refused, but never crashes
        try:
            assert checkpoint.load(tmp_path / "w.pt") == {}
        except CheckpointError:
            pass
        return
    with pytest.raises(CheckpointError, match="w.pt: is damaged or no checkpoint of ours"):
        checkpoint.load(tmp_path / "w.pt")


def test_other_formats_and_missing_files_are_named(tmp_path):
    torch.save({"format": 99}, tmp_path / "new.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, part in (("new.pt", "format 99"), ("list.pt", "format 'list'"), ("none.pt", "cannot be read"), (".", "cannot be read")):
        with pytest.raises(CheckpointError, match=part):
            checkpoint.load(tmp_path / name)


@pytest.mark.parametrize("error, raised, told", [
    (MemoryError(), MemoryError, None), (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), RuntimeError, "allocate"),
    (OSError(5, "Input/output error"), CheckpointError, "w.pt: cannot be read .Input/output error.: try again")])
def test_a_file_is_not_called_damaged_for_want_of_memory_or_a_disk(tmp_path, monkeypatch, error, raised, told):
    checkpoint.save(tmp_path / "w.pt", state())

    def fails(*_, **__):
        raise error
    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(raised, match=told):
        checkpoint.load(tmp_path / "w.pt")


def test_an_apple_gpus_generator_is_kept(monkeypatch):
    """Which dropout draws from there."""
    kept = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor([7]))
    monkeypatch.setattr(torch.mps, "set_rng_state", kept.append)
    net = torch.nn.Linear(1, 1)
    parts = net, torch.optim.SGD(net.parameters()), torch.amp.GradScaler("cpu", enabled=False), SimpleNamespace(
        device=torch.device("mps"), get_state=lambda: None, set_state=lambda _: None)
    saved = checkpoint.training_state(*parts)
    checkpoint.restore_training_state(saved, *parts)
    assert kept == [torch.tensor([7])]
    del saved["generators"]["mps"]    # as of earlier versions
    checkpoint.restore_training_state(saved, *parts)
    assert len(kept) == 1


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("writer", [lambda x, path: torch.save(x, path), lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_a_payload_is_not_run(tmp_path, writer):
    writer({"format": 1, "model": Payload(str(tmp_path / "sentinel"))}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path / "w.pt")
    assert not (tmp_path / "sentinel").exists()
