"""Save and load training state: whole files only, and nothing in them but tensors and plain values."""
from __future__ import annotations

import os
from pathlib import Path

import torch

from seresnet import runtime
from seresnet.runtime import UserError

FORMAT = 1    # raised when a reader of today could not understand the file


class CheckpointError(UserError):
    """A checkpoint cannot be written or read; the message names the file and the way out."""


def save(path: Path | str, state: dict) -> None:
    """Write `state` to `path`, so that at any moment the file there is the old one or the new one, whole.

    state: nested dicts and lists of tensors, numbers, strings, booleans and None; ValueError, naming the entry, for
    anything else. Raises CheckpointError where it cannot be written; the old file is then untouched.
    """
    path = Path(path)
    _check_plain(state, "state")
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:    # open() rather than mkstemp: the mode follows the user's umask
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        runtime.sync(path.parent)
    except (OSError, RuntimeError) as error:    # torch reports a full disk as RuntimeError
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: cannot be written ({reason}): free space there, or choose another folder with "
                              "--run.folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path | str) -> dict:
    """The state saved at `path`, its tensors on the CPU.

    Read with torch's `weights_only`, which builds tensors and plain values and runs no code from the file. Raises
    CheckpointError where the file is missing, damaged, foreign, or of another format.
    """
    path = Path(path)
    try:
        file = open(path, "rb")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): give the path of a weights.pt") from error
    try:
        with file:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:    # torch and pickle raise a dozen kinds for files that are no checkpoint
        raise CheckpointError(f"{path}: is damaged or no checkpoint of ours ({type(error).__name__}): give another, or "
                              "train again") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path}: is of format {found!r}, this version reads {FORMAT}: use the version that wrote it")
    del state["format"]
    return state


def _check_plain(value: object, where: str) -> None:
    if isinstance(value, dict):
        for name, entry in value.items():
            if not isinstance(name, (str, int)):
                raise ValueError(f"{where}: key {name!r} is neither text nor a number")
            _check_plain(entry, f"{where}.{name}")
    elif isinstance(value, list):
        for i, entry in enumerate(value):
            _check_plain(entry, f"{where}[{i}]")
    elif type(value) not in (torch.Tensor, int, float, bool, str, type(None)):
        raise ValueError(f"{where}: {type(value).__name__} is neither a tensor nor a plain value")
