"""checkpoint: whole files or the old ones, and nothing in them that could run."""
import os
import pickle
import stat
import subprocess
import sys

import pytest
import torch

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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_FSIZE with a catchable error is Linux's")
def test_a_full_disk_while_writing_is_a_clear_error(tmp_path):
    code = ("import resource, signal, sys, torch; from seresnet import checkpoint\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
            "try: checkpoint.save(sys.argv[1], {'w': torch.zeros(100000)})\n"
            "except checkpoint.CheckpointError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "w.pt")], capture_output=True, text=True, timeout=60)
    assert "w.pt: cannot be written" in done.stdout, done.stderr
    assert os.listdir(tmp_path) == []


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere/w.pt: cannot be written"):
        checkpoint.save(tmp_path / "nowhere" / "w.pt", state())


def test_killed_at_any_moment_the_file_is_whole(tmp_path):
    code = ("import sys, torch; from seresnet import checkpoint; print('ready', flush=True)\n"
            "for i in range(10**6): checkpoint.save(sys.argv[1], {'w': torch.full((200000,), float(i))})")
    for delay in (0.0, 0.003, 0.01, 0.02, 0.05):
        with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "w.pt")], stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            try:
                child.wait(0.05 + delay)
            except subprocess.TimeoutExpired:
                child.kill()
        if (tmp_path / "w.pt").exists():
            assert len(checkpoint.load(tmp_path / "w.pt")["w"].unique()) == 1


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
