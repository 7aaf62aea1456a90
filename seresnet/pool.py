"""2x2 max-pooling: torch's, and compiled where memory sets the pace."""
from __future__ import annotations

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from seresnet.compiled import passes_for, worth_it


class MaxPool2x2(nn.MaxPool2d):
    """The greatest of each 2x2 pixels: (B, C, H, W) -> (B, C, H // 2, W // 2). An odd last row or column is dropped."""

    def __init__(self):
        super().__init__(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _MaxPool2x2.apply(x) if worth_it(x) else super().forward(x)


class _MaxPool2x2(torch.autograd.Function):
    """Max-pooling that remembers in one byte which of four pixels it took, where torch writes an int64, and whose backward pass
    writes each pixel once, where torch fills with zeros and then scatters: both passes are bound by what they write and read.

    Takes what torch takes, the first of equal pixels, and NaN before all numbers; but on a CPU of 0 and -0 it takes 0, and of several NaN
    the greatest bits, where torch takes the first and the last.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        count, channels, height, width = ctx.shape = x.shape
        pooled = x.new_empty(count, height // 2, width // 2, channels)
        ctx.taken = torch.empty_like(pooled, dtype=torch.uint8)
        ctx.run = passes_for(x)
        ctx.run.pool(x.permute(0, 2, 3, 1), pooled, ctx.taken)
        return pooled.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        count, channels, height, width = ctx.shape
        spread = gradient.new_empty(count, height, width, channels)
        ctx.run.unpool(gradient.permute(0, 2, 3, 1).contiguous(), ctx.taken, spread)
        return spread.permute(0, 3, 1, 2)
