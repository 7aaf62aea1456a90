"""Layers that do to a process's share of a batch what one process would do to the whole batch: batch normalisation, dropout.

`synchronise` turns the layers of a net into these. They stay the same objects, with the same parameters, buffers and names, so
that checkpoints and optimizer do not notice; in evaluation they are what they were.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


def synchronise(model: nn.Module, gather: Callable[[torch.Tensor], torch.Tensor], share: slice, norms: bool) -> None:
    """Let dropout, and with `norms` batch normalisation, take this process's part of the whole batch into account.

    gather: a tensor -> (processes, ...), those of all processes. share: which samples of a batch are this process's.
    """
    for module in model.modules():
        if norms and type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm2d    # the net may hold a layer under several names: it has to remain that layer
            module.gather = gather
        elif type(module) is nn.Dropout and module.p > 0:
            module.__class__ = SharedDropout
            module.share, module.whole = share, 0


def expect(model: nn.Module, whole: int) -> None:
    """Tell the net of how many samples the next batch is, all processes together."""
    for module in model.modules():
        if isinstance(module, SharedDropout):
            module.whole = whole


class SharedDropout(nn.Dropout):
    """Dropout of a share of `whole` samples: the mask is drawn for all of them, by every process alike."""

    share: slice
    whole: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        return x * F.dropout(x.new_ones(self.whole, *x.shape[1:]), self.p)[self.share]


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation by the statistics of all processes' samples together (as torch.nn.SyncBatchNorm, which knows no CPU).

    (B, C, H, W) -> same, where B may differ between processes and be 0. Statistics are exchanged and combined in float32.
    """

    gather: Callable[[torch.Tensor], torch.Tensor]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        y, mean, variance, count = _Normalise.apply(x, self.weight, self.bias, self.eps, self.gather)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1).clamp(min=1)), self.momentum)    # unbiased, as torch keeps it
        return y


class _Normalise(torch.autograd.Function):
    """The normalised share, and mean, biased variance and count of the whole, which are not to be differentiated."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, gather):
        channels = x.shape[1]
        here = x.numel() // channels
        if here:
            variance, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        else:
            variance = mean = torch.zeros(channels, dtype=torch.float32, device=x.device)
        rows = gather(torch.cat([mean, variance, mean.new_full((1,), here)]))    # (processes, 2 C + 1)
        means, variances, counts = rows[:, :channels], rows[:, channels:-1], rows[:, -1:]
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        # of all samples: the mean within the shares, and between them (Chan, Golub and LeVeque, 1979)
        variance = ((variances + (means - mean) ** 2) * counts).sum(0) / count
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps, ctx.gather = eps, gather
        ctx.mark_non_differentiable(mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps), mean, variance, count

    @staticmethod
    def backward(ctx, gradient, *_):
        x, weight, mean, variance, count = ctx.saved_tensors
        scale = (variance + ctx.eps).rsqrt()
        centred = x.float() - mean[:, None, None]
        gradient32 = gradient.float()
        for_bias, for_weight = gradient32.sum((0, 2, 3)), (gradient32 * centred).sum((0, 2, 3)) * scale
        # Of the whole batch for x; weight and bias keep their share, of which DistributedDataParallel makes the mean.
        both = ctx.gather(torch.stack([for_bias, for_weight])).sum(0) / count
        mean_gradient, mean_product = both[0], both[1] * scale
        for_x = None
        if ctx.needs_input_grad[0]:
            for_x = gradient32.sub_(mean_gradient[:, None, None]) if gradient32 is not gradient else (
                gradient32 - mean_gradient[:, None, None])
            for_x = for_x.addcmul_(centred, mean_product[:, None, None], value=-1)
            for_x = for_x.mul_((scale * weight)[:, None, None]).to(x.dtype)
        return for_x, for_weight, for_bias, None, None
