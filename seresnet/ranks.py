"""The one file that knows process groups: several processes that train one net, their collectives, and who speaks for them.

PyTorch brings the parts: torchrun starts the processes, DistributedDataParallel averages gradients. What training itself has to
agree on (counts, a wish to stop, whether anything failed) goes over gloo between the CPUs, on GPUs too, so that it never waits
for a device and is the same code everywhere; gradients and norm statistics go where the tensors are: NCCL on GPUs.
"""
from __future__ import annotations

import gc
import itertools
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from inspect import signature

import torch
import torch.distributed as dist
from torch import nn

from seresnet import runtime
from seresnet.runtime import Launch, UserError

# A process that has not answered for so long is taken for dead. One whose connection breaks is missed at once: this is for machines that lose
# their power, and has to be longer than one of them takes to read a set of tens of GB, which others may have in memory already.
SILENCE_SECONDS = 600

_JOINED = itertools.count()    # a program may train several nets, one after the other: each finds a store without old entries


class FailedElsewhere(UserError):
    """Another process failed, and says why; this one ends without a word."""


class Ranks:
    """All processes of a training, seen from one of them. With one process every method is the plain thing, and costs nothing."""

    def __init__(self, of: Launch = Launch()):
        self.launch = of
        self.world, self.main = of.world, of.rank == 0    # main: whether this is the one that writes and prints
        self._asked: tuple | None = None

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """(world, ...): the tensors, alike in shape and dtype, that all processes call this with."""
        if self.world == 1:
            return tensor[None]
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(found, tensor.contiguous())
        return torch.stack(found)

    def broadcast(self, content: bytes) -> bytes:
        """The first process's `content`, in all of them."""
        if self.world == 1:
            return content
        length = torch.tensor([len(content)])
        dist.broadcast(length, 0)
        # bytearray: torch wants memory that may be written to
        buffer = torch.frombuffer(bytearray(content) if self.main else bytearray(int(length)), dtype=torch.uint8) if int(length) else None
        if buffer is None:
            return b""
        dist.broadcast(buffer, 0)
        return buffer.numpy().tobytes()

    def agree(self, value: int) -> int:
        """The largest value, not negative, that any process called this with the last time: all get the same, and none waits.

        One call behind, because the answer travels while the next step is computed; with one process, `value` itself.
        """
        if self.world == 1:
            return value
        answer = self._answer()
        if not answer:
            tensor = torch.tensor([value])
            self._asked = dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True), tensor
        return answer

    def _answer(self) -> int:
        if self._asked is None:
            return 0
        work, tensor = self._asked
        self._asked = None
        work.wait()
        return int(tensor)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that may fail in some processes only, such as the one that writes: then all of them leave. No collective may
        stand inside it."""
        if self.world == 1:
            yield
            return
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        failures = self.gather(torch.tensor([failure is not None]))
        if failure is not None:
            raise failure
        if failures.any():
            raise FailedElsewhere("another process failed")

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """`model` as it is trained: its gradients become the mean over the processes. All begin with the first one's weights."""
        if self.world == 1:
            return model
        # Norm buffers are not broadcast in every step: synced.py keeps them equal, or equalise() makes them so. They begin equal, too:
        # torch before 2.13 can only leave out the broadcast at the start along with those.
        parallel = nn.parallel.DistributedDataParallel
        known = signature(parallel.__init__).parameters
        quiet = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
        return parallel(model, device_ids=[device] if device.type == "cuda" else None, gradient_as_bucket_view=True, **quiet)

    @torch.no_grad()
    def equalise(self, model: nn.Module) -> None:
        """Give all processes the mean of their norm statistics (running averages are linear: it is the average of the means)."""
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        if self.world == 1 or not buffers:
            return
        mean = self.gather(torch.cat([buffer.flatten() for buffer in buffers])).mean(0)
        for buffer, part in zip(buffers, mean.split([buffer.numel() for buffer in buffers])):
            buffer.copy_(part.view_as(buffer))

    def check_same(self, what: str, fingerprint: int, way_out: str = "give all machines the same files and command line") -> None:
        """Raise UserError, in all processes, where they do not have the same `fingerprint` (below 2**63)."""
        found = self.gather(torch.tensor([fingerprint])).flatten().tolist()
        if len(set(found)) > 1:
            other = next(rank for rank, value in enumerate(found) if value != found[0])
            raise UserError(f"process {other} has another {what} than process 0: {way_out}")


@contextmanager
def join(of: Launch, device: torch.device) -> Iterator[Ranks]:
    """The processes of a training, from finding each other to leaving; what the first does not print, none does.

    An error that ends one of them ends all, and one of them says why: the first that has something to say.
    Raises UserError where they do not find each other, or where one is gone.
    """
    if of.world == 1:
        yield Ranks(of)
        return
    from torch.distributed.rendezvous import rendezvous
    if of.world == of.local_world:
        runtime.stay_on_this_machine()
    silence = timedelta(seconds=SILENCE_SECONDS)
    try:
        store, _, _ = next(iter(rendezvous("env://", of.rank, of.world, timeout=silence)))
        store.set_timeout(silence)
        store = dist.PrefixStore(f"seresnet/{of.restarts}/{next(_JOINED)}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=dist.PrefixStore("group", store),
                                rank=of.rank, world_size=of.world, timeout=silence)
    except (dist.DistError, RuntimeError) as error:
        raise UserError(f"the {of.world} processes did not find each other ({_first_line(error)}): are all machines started, and do "
                        "they reach the first one's MASTER_ADDR and MASTER_PORT? Where a machine has several networks, "
                        "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the one to take") from error
    ranks = Ranks(of)
    log = logging.getLogger("seresnet")
    log.disabled, disabled = log.disabled or not ranks.main, log.disabled
    try:
        with nullcontext() if ranks.main else open_null() as null, nullcontext() if ranks.main else redirect_stdout(null):
            yield ranks
        ranks._answer()
        gc.collect()    # DistributedDataParallel lies in a circle, and aborts the program where it outlives the group
        dist.destroy_process_group()
    except BaseException as error:
        # The group is left to the system: taking it apart may wait for processes that will not answer, and the message with it.
        runtime.give_voice(not isinstance(error, FailedElsewhere) and _first_to_speak(store))
        if is_loss(error):
            raise UserError(f"another of the {of.world} processes ended without a word, or did not answer for {SILENCE_SECONDS} s "
                            f"(the launcher's report names it; {_first_line(error)}): go on from the last checkpoint with "
                            "--run.resume") from error
        raise
    finally:
        log.disabled = disabled


def open_null():
    """Where other processes print."""
    return open(os.devnull, "w", encoding="utf-8")


def is_loss(error: BaseException) -> bool:
    """Whether `error` is what a collective raises when a process at its other end has gone."""
    return isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and bool(
        re.search(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Bb]roken pipe", str(error)))


def _first_to_speak(store) -> bool:
    try:
        return store.add("speaker", 1) == 1
    except (dist.DistError, RuntimeError):    # the store went with the first process
        return True


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
