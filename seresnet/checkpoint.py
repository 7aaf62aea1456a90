"""Save and load training state: whole files only, and nothing in them but tensors and plain values.

    last.pt       all that a training needs to go on as if it had never stopped (loop.py lays it out)
    weights.pt    the net after the last whole epoch, with what is needed to rebuild it and to feed it images
    best.pt       the same, after the epoch with the best evaluation
"""
from __future__ import annotations

import errno
import io
from pathlib import Path
from typing import IO

import torch
from torch import nn

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
    try:
        with runtime.whole_file(path) as temporary, open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
    except (OSError, RuntimeError) as error:    # torch reports a full disk as RuntimeError
        if isinstance(error, RuntimeError) and (runtime.is_out_of_memory(error) or "CUDA" in str(error)):
            raise
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())[:200]
        way_on = (f"then go on from what was saved before: --run.resume {path.parent}" if path.with_name("last.pt").exists() else
                  "or choose another folder with --run.folder")
        raise CheckpointError(f"{path}: cannot be written ({reason}): free space there, {way_on}") from error


def load(path: Path | str) -> dict:
    """The state saved at `path`, its tensors on the CPU.

    Read with torch's `weights_only`, which builds tensors and plain values and runs no code from the file. Raises
    CheckpointError where the file is missing, damaged, foreign, or of another format.
    """
    path = Path(path)
    try:
        file = open(path, "rb")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): name a run folder, or its weights.pt or best.pt") from error
    with file:
        return _read(file, path)


def pack(state: dict | None) -> bytes:
    """`state` as another process of this training takes it with `unpack`."""
    content = io.BytesIO()
    if state is not None:
        _check_plain(state, "state")
        torch.save({"format": FORMAT, **state}, content)
    return content.getvalue()


def unpack(content: bytes) -> dict | None:
    """What `pack` was given, its tensors on the CPU."""
    return _read(io.BytesIO(content), "the first process's state") if content else None


def _read(file: IO[bytes], path: Path | str) -> dict:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:    # torch and pickle raise a dozen kinds for files that are no checkpoint
        if runtime.is_out_of_memory(error):
            raise
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):    # a disk's; the others are of places that are not in the file
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}): try again, or give another") from error
        raise CheckpointError(f"{path}: is damaged or no checkpoint of ours ({type(error).__name__}): give another, or "
                              "train again") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(f"{path}: is of format {found!r}, this version reads {FORMAT}: use the version that wrote it")
    del state["format"]
    return state


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                   generator: torch.Generator, average: nn.Module | None = None) -> dict:
    """All that changes from step to step: weights and norm buffers, their average where there is one, the optimizer's buffers, the
    gradient scale, and the state of every generator of random numbers (`generator`: augmentation's; torch's own: dropout's)."""
    generators = {"augmentation": generator.get_state(), "torch": torch.get_rng_state()}
    if generator.device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(generator.device)
    elif generator.device.type == "mps":
        generators["mps"] = torch.mps.get_rng_state()
    # The optimizer's groups follow from config and net: they are built anew, not read.
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()["state"], "scaler": scaler.state_dict(),
            "generators": generators, "average": average.state_dict() if average else None}


def restore_training_state(state: dict, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                           generator: torch.Generator, average: nn.Module | None = None) -> None:
    """Put what `training_state` gave back into objects that were built from the same config.

    Raises CheckpointError where it does not fit them.
    """
    try:
        model.load_state_dict(state["model"])
        if average:
            average.load_state_dict(state["average"])
        optimizer.load_state_dict({"state": state["optimizer"], "param_groups": optimizer.state_dict()["param_groups"]})
        if scaler.is_enabled() and state["scaler"]:    # none of a run that was in another format so far
            scaler.load_state_dict(state["scaler"])
        generator.set_state(state["generators"]["augmentation"])
        torch.set_rng_state(state["generators"]["torch"])
        if generator.device.type == "cuda":
            torch.cuda.set_rng_state(state["generators"]["cuda"], generator.device)
        elif generator.device.type == "mps" and "mps" in state["generators"]:    # earlier versions kept none
            torch.mps.set_rng_state(state["generators"]["mps"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if runtime.is_out_of_memory(error):
            raise
        raise CheckpointError(f"the checkpoint does not fit this net and machine ({' '.join(str(error).split())[:200]}): "
                              "resume with the version and the kind of device that wrote it") from error


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
