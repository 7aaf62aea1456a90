"""2x2 max-pooling: torch's, and compiled by numba where memory sets the pace: training in bfloat16 on a CPU."""
from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

LEAST = 1 << 20    # elements from which loading the compiled code, some tenths of a second once, is worth it


class MaxPool2x2(nn.MaxPool2d):
    """The greatest of each 2x2 pixels: (B, C, H, W) -> (B, C, H // 2, W // 2). An odd last row or column is dropped."""

    def __init__(self):
        super().__init__(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (x.dtype == torch.bfloat16 and x.device.type == "cpu" and torch.is_grad_enabled() and x.requires_grad and x.numel() >= LEAST
                and x.is_contiguous(memory_format=torch.channels_last) and not torch.compiler.is_compiling() and compiled() is not None):
            return _MaxPool2x2.apply(x)
        return super().forward(x)


class _MaxPool2x2(torch.autograd.Function):
    """Max-pooling that remembers in one byte which of four pixels it took, where torch writes an int64, and whose backward pass
    writes each pixel once, where torch fills with zeros and then scatters: both passes are bound by what they write and read.

    Takes what torch takes, the first of equal pixels, and NaN before all numbers; but of 0 and -0 it takes 0, and of several NaN
    the greatest bits, where torch takes the first and the last.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        count, channels, height, width = ctx.shape = x.shape
        pooled = x.new_empty(count, height // 2, width // 2, channels)
        ctx.taken = torch.empty(pooled.shape, dtype=torch.uint8)
        compiled().forward(_bits(x.permute(0, 2, 3, 1)), _bits(pooled), ctx.taken.numpy())
        return pooled.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        count, channels, height, width = ctx.shape
        spread = gradient.new_empty(count, height, width, channels)
        compiled().backward(_bits(gradient.permute(0, 2, 3, 1).contiguous()), ctx.taken.numpy(), _bits(spread))
        return spread.permute(0, 3, 1, 2)


def _bits(tensor: torch.Tensor):
    """A bfloat16 tensor's memory as an int16 array: numba knows no bfloat16."""
    return tensor.detach().view(torch.int16).numpy()


@cache
def compiled() -> SimpleNamespace | None:
    """The passes `forward(x, pooled, taken)` and `backward(gradient, taken, spread)` over arrays (B, H, W, C), in as many threads as
    torch has, ready to run. None where numba is missing or does not work, and where its threads are of the kind that may not be started
    from several Python threads at once, as FFCV's reader and a training would.

    numba keeps the machine code on disk (beside this file, or in the user's cache folder): it compiles once a machine.
    """
    try:
        import numba
    except ImportError:
        return None
    if numba.config.DISABLE_JIT:
        return None

    def forward(x, pooled, taken):
        count, tall, wide, channels = pooled.shape
        for image in numba.prange(count):
            for i in range(tall):
                for j in range(wide):
                    for c in range(channels):
                        best, highest, place = numba.int16(0), numba.int16(-32768), numba.uint8(0)
                        for k in range(4):
                            bits = x[image, 2 * i + k // 2, 2 * j + k % 2, c]
                            # of the same order as the numbers, as an integer; less 127 it wraps, and NaN of either sign is greatest
                            order = numba.int16(numba.int16(bits ^ ((bits >> 15) & 0x7fff)) - 127)
                            if k == 0 or order > highest:
                                best, highest, place = bits, order, numba.uint8(k)
                        pooled[image, i, j, c], taken[image, i, j, c] = best, place

    def backward(gradient, taken, spread):
        count, tall, wide, channels = gradient.shape
        for image in numba.prange(count):
            for i in range(tall):
                for j in range(wide):
                    for k in range(4):
                        for c in range(channels):
                            value = gradient[image, i, j, c] if taken[image, i, j, c] == k else 0
                            spread[image, 2 * i + k // 2, 2 * j + k % 2, c] = value
            spread[image, 2 * tall:] = 0
            spread[image, :, 2 * wide:] = 0

    def threaded(function):
        def call(*arrays):
            threads = torch.get_num_threads()
            numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
            torch.set_num_threads(threads)    # numba's OpenMP, started first, sets the number that is torch's, too
            function(*arrays)
        return call

    for keep in (True, False):    # a cache that cannot be written is no reason to do without
        try:
            passes = {function.__name__: threaded(numba.njit(function, parallel=True, cache=keep)) for function in (forward, backward)}
            four, one = np.zeros((1, 2, 2, 1), np.int16), np.zeros((1, 1, 1, 1), np.int16)
            passes["forward"](four, one, one.astype(np.uint8))
            passes["backward"](one, one.astype(np.uint8), four)
        except (RuntimeError, OSError, numba.core.errors.NumbaError):
            continue
        return SimpleNamespace(**passes) if numba.threading_layer() in ("omp", "tbb") else None
    return None
