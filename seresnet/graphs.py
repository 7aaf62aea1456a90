"""A step's forward and backward pass recorded as a CUDA graph and replayed: one launch for hundreds of kernels."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

Recorder = Callable[[Callable[[], Sequence[torch.Tensor]]], tuple[Callable[[], None], Sequence[torch.Tensor]]]


class Replays:
    """Computes as a function does that fills the gradients of `parameters`, the third time on from a recording.

    A small net's kernels take less time on a GPU than the host takes to launch them one by one. Of each shape of input the first
    call is an ordinary one, in which libraries choose their algorithms and take their memory; the second records; from then on
    the recording is replayed, on the arguments copied to where it expects them. All recordings share their memory, which they keep.

    record(work) -> (replay, results) of work() -> results: `cuda_graphs()` on a GPU. What is recorded may not wait for the device,
    nor do anything on the host that matters. Results and gradients are valid until the next call.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], record: Recorder):
        self._parameters, self._record = list(parameters), record
        self._seen: set[tuple] = set()
        self._recordings: dict[tuple, tuple] = {}

    def of(self, compute: Callable[..., Sequence[torch.Tensor]]) -> Callable[..., Sequence[torch.Tensor]]:
        """`compute`, of tensors and of numbers that it may not tell apart from constants, replayed where that is possible. A
        recording serves whatever later function is handed in here: they have to be the same in effect."""
        return lambda *inputs: self._run(compute, inputs)

    def _run(self, compute: Callable, inputs: Sequence) -> Sequence[torch.Tensor]:
        key = tuple((value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value for value in inputs)
        if key not in self._seen:
            self._seen.add(key)
            return compute(*inputs)
        if key not in self._recordings:
            own = [value.clone() if isinstance(value, torch.Tensor) else value for value in inputs]
            for parameter in self._parameters:
                parameter.grad = None    # so that backward makes them, where the recording will fill them again
            replay, results = self._record(lambda: compute(*own))
            self._recordings[key] = own, replay, results, [parameter.grad for parameter in self._parameters]
        own, replay, results, gradients = self._recordings[key]
        for kept, value in zip(own, inputs):
            if isinstance(value, torch.Tensor):
                kept.copy_(value)
        replay()
        for parameter, gradient in zip(self._parameters, gradients):
            parameter.grad = gradient
        return results


def cuda_graphs() -> Recorder:
    """Records CUDA graphs, which share one pool of memory: no two of them may be at work at the same time."""
    pool = torch.cuda.graph_pool_handle()

    def record(work: Callable[[], Sequence[torch.Tensor]]) -> tuple[Callable[[], None], Sequence[torch.Tensor]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):    # a loader's thread copies to the device meanwhile
            results = work()
        return graph.replay, results
    return record
