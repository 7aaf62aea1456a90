"""A step's forward and backward pass, and what an optimizer does, recorded as CUDA graphs and replayed: one launch for hundreds of kernels."""
from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import nn

Recorder = Callable[[Callable[[], Sequence[torch.Tensor]]], tuple[Callable[[], None], Sequence[torch.Tensor]]]


class NotRecorded(RuntimeError):
    """A step could not be recorded; it says why."""


class Replays:
    """Computes as a function does that fills the gradients of `parameters`, from the second time on from a recording.

    A small net's kernels take less time on a GPU than the host takes to launch them one by one. Of each shape of input the first
    call is an ordinary one, in which libraries choose their algorithms and take their memory; the second records; from it on
    the recording is replayed, on the arguments copied to where it expects them. Recordings share the memory that they work in; what
    goes in and comes out, gradients too, each has of its own, and all of it is kept.

    record(work) -> (replay, results) of work() -> results: `cuda_graphs()` on a GPU. What is recorded may not wait for the device,
    nor do anything on the host that matters. Results and gradients are valid until the next call. `recordings` counts them.

    Raises NotRecorded where `record` fails.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], record: Recorder):
        self._parameters, self._record = list(parameters), record
        self._seen: set[tuple] = set()
        self._recordings: dict[tuple, tuple] = {}

    def of(self, compute: Callable[..., Sequence[torch.Tensor]]) -> Callable[..., Sequence[torch.Tensor]]:
        """`compute`, of tensors and of numbers that it may not tell apart from constants, replayed where that is possible. A
        recording serves whatever later function is handed in here: they have to be the same in effect."""
        return lambda *inputs: self._run(compute, inputs)

    @property
    def recordings(self) -> int:
        """How many there are."""
        return len(self._recordings)

    def _run(self, compute: Callable, inputs: Sequence) -> Sequence[torch.Tensor]:
        key = tuple((value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value for value in inputs)
        if key not in self._seen:
            self._seen.add(key)
            return compute(*inputs)
        if key not in self._recordings:
            own = [value.clone() if isinstance(value, torch.Tensor) else value for value in inputs]
            for parameter in self._parameters:
                parameter.grad = None    # so that backward makes them, where the recording will fill them again
            replay, results = _recorded(self._record, lambda: compute(*own))
            self._recordings[key] = own, replay, results, [parameter.grad for parameter in self._parameters]
        own, replay, results, gradients = self._recordings[key]
        for kept, value in zip(own, inputs):
            if isinstance(value, torch.Tensor):
                kept.copy_(value)
        replay()
        for parameter, gradient in zip(self._parameters, gradients):
            parameter.grad = gradient
        return results


class Repeats:
    """Does what a function does to tensors where they lie, as an optimizer's update, from the second time on from a recording.

    One call of `run` is the same as another where the tensors are at the same addresses, in the same layout, and `constants` are equal:
    then the second records, and it and those that follow replay. Recordings keep none of the tensors.

    Raises NotRecorded where `record` fails.
    """

    def __init__(self, record: Recorder):
        self._record = record
        self._seen: set[Hashable] = set()
        self._replays: dict[Hashable, Callable[[], None]] = {}

    @property
    def recordings(self) -> int:
        """How many there are."""
        return len(self._replays)

    def run(self, work: Callable[[], None], tensors: Iterable[torch.Tensor], constants: Hashable) -> None:
        """Do `work`, which reads and changes `tensors` and what else always lies where it is, and depends on no number but `constants`."""
        key = (tuple((tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors), constants)
        if key not in self._seen:
            self._seen.add(key)
            work()
            return
        if key not in self._replays:
            def without_results() -> Sequence[torch.Tensor]:
                work()
                return ()
            self._replays[key], _ = _recorded(self._record, without_results)
        self._replays[key]()


def _recorded(record: Recorder, work: Callable[[], Sequence[torch.Tensor]]) -> tuple[Callable[[], None], Sequence[torch.Tensor]]:
    try:
        return record(work)
    except RuntimeError as error:    # also out of memory, which what ends a recording may have hidden
        raise NotRecorded(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error


def cuda_graphs() -> Recorder:
    """Records CUDA graphs, which share one pool of memory: no two of them may be at work at the same time."""
    pool = torch.cuda.graph_pool_handle()
    # Streams are handed out from 32 in turn, also to FFCV, whose thread would copy into the recording; those of high priority are others.
    stream = torch.cuda.Stream(priority=-1)

    def record(work: Callable[[], Sequence[torch.Tensor]]) -> tuple[Callable[[], None], Sequence[torch.Tensor]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):    # a loader's thread copies to the device meanwhile
            results = work()
        return few_ahead(graph.replay, [torch.cuda.Event(blocking=True) for _ in range(2)]), results
    return record


def few_ahead(replay: Callable[[], None], events: Sequence) -> Callable[[], None]:
    """`replay`, of which no more wait for the device than there are `events`: the next waits for the oldest of them.

    The device has work enough by that. Without it the host is ahead by as many steps as the driver's queue holds. Of 17 trainings that
    replayed one graph twice a step, three ended by a crash in the driver or on the device (records/); that a long queue is the cause is a
    guess.
    """
    count = 0

    def replay_when_due() -> None:
        nonlocal count
        event = events[count % len(events)]
        if count >= len(events):
            event.synchronize()
        replay()
        event.record()
        count += 1
    return replay_when_due
