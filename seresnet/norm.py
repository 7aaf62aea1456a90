"""Batch normalisation and what follows it: layer by layer, and in fewer passes over memory where that sets the pace."""
from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from seresnet import compiled
from seresnet.compiled import passes_for, worth_it

FUSED = (nn.GELU, nn.ReLU, nn.LeakyReLU)    # that the passes know
RECTIFIED = 4    # times as many elements as compiled.LEAST
LEAST_SCALE = 1e-30    # of a shortcut: in the passes, which count in float32, a scale of 0 says that there is none


def normalise(x: torch.Tensor, norm: nn.BatchNorm2d, activation: nn.Module, gate: nn.Module | None = None,
              shortcut: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
    """activation(gate(norm(x)) + scale * shortcut), without the gate or the shortcut where there is none.

    x, shortcut, result: (B, C, H, W). gate: a SqueezeExcitation. In few passes neither the layers' own hooks nor those of the gate
    are called.
    """
    if (not torch.jit.is_tracing()    # first, so that a trace is not warned of what follows
            and _are_known(norm, activation) and x.shape[0] * x.shape[2] * x.shape[3] > 1
            and (shortcut is None or abs(scale) > LEAST_SCALE and shortcut.dtype == x.dtype and shortcut.shape == x.shape
                 and shortcut.is_contiguous(memory_format=torch.channels_last))
            and (norm.training or not torch.is_grad_enabled()) and _is_large(x, activation) and worth_it(x)):
        below = None if type(activation) is nn.GELU else float(getattr(activation, "negative_slope", 0))
        if not norm.training:
            return _evaluated(norm, gate, scale, below, x, shortcut)
        return _FewPasses.apply(norm, gate, scale, below, x, shortcut, norm.weight, norm.bias, *(gate.parameters() if gate else ()))
    x = norm(x)
    if gate is not None:
        x = gate(x)
    if shortcut is not None:
        x = torch.add(x, shortcut, alpha=scale)
    return activation(x)


def _are_known(norm: nn.Module, activation: nn.Module) -> bool:
    """Whether the passes compute what these layers do."""
    return (type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats and norm.momentum is not None
            and norm.weight.dtype == norm.running_mean.dtype == torch.float32
            and type(activation) in FUSED and getattr(activation, "approximate", "none") == "none")


def _is_large(x: torch.Tensor, activation: nn.Module) -> bool:
    """Whether x is so large that a ReLU's passes may pay, too: on a CPU they gain little over torch's, and take seconds to compile where they
    are first needed, which a training of half a minute would feel."""
    return x.is_cuda or type(activation) is nn.GELU or x.numel() >= RECTIFIED * compiled.LEAST


def _evaluated(norm: nn.BatchNorm2d, gate, scale: float, below: float | None, x: torch.Tensor, shortcut: torch.Tensor | None) -> torch.Tensor:
    """`normalise` with the running statistics, without gradients, in one pass over memory; with gate another looks at the means."""
    factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
    a, d = factor[None], (norm.bias - norm.running_mean * factor)[None]
    if gate:
        gates = gate.gate(x.mean((2, 3), dtype=torch.float32) * a + d).float()
        a, d = a * gates, d * gates
    return _activated(x, shortcut, a, d, scale, below)


def _activated(x: torch.Tensor, shortcut: torch.Tensor | None, a: torch.Tensor, d: torch.Tensor, scale: float,
               below: float | None) -> torch.Tensor:
    """activation(a * x + d + scale * shortcut); a, d: (1, C), or (B, C) with a gate's. below: None for GELU, of a ReLU the factor of what is
    negative."""
    y = torch.empty_like(x)
    passes_for(x).activate(_flat(x), *_added(x, shortcut, a, d, scale), below, _flat(y))
    return y


def _added(x: torch.Tensor, shortcut: torch.Tensor | None, a: torch.Tensor, d: torch.Tensor, scale: float) -> tuple:
    """What the passes take behind x: without a shortcut x stands for it, at a scale of 0."""
    return _flat(x if shortcut is None else shortcut), a, d, 0.0 if shortcut is None else scale


class _FewPasses(torch.autograd.Function):
    """`normalise` of a training, in two passes over memory forwards and two backwards. Both ways together that is 8 reads and
    writes of x's size instead of the 13 of layer by layer, and with gate and shortcut 12 instead of 33.

    The first pass of either kind sums over the pixels of each image, from which follow the statistics of the batch, the mean that
    squeeze-and-excitation looks at, and its gradient; the second writes. In between all is float32. What is kept for the backward
    pass is x and the shortcut: it computes the rest again.
    """

    @staticmethod
    def forward(ctx, norm: nn.BatchNorm2d, gate, scale: float, below: float | None, x, shortcut, weight, bias, *of_gate) -> torch.Tensor:
        images, size = len(x), x.shape[2] * x.shape[3]
        run, channels = passes_for(x), x.shape[1]
        total, squares = (weight.new_empty(images if gate else min(run.ROWS, images), channels) for _ in range(2))
        pivot = x[0, :, 0, 0].float()    # sums of differences to some value of the data: where the mean is large, no digits are lost
        run.sums(_flat(x), pivot, total, squares)
        mean, deviation, factor, rest = run.statistics(norm, total, squares, pivot, images * size)
        a, d = factor[None], rest[None]
        ctx.gates_back = None
        if gate:
            there, back = _gates_by(run, gate)
            a, d, kept = there(gate, total, pivot, mean, factor, rest, bias, size)
            ctx.gates_back = partial(back, gate, kept)
        ctx.scale, ctx.below, ctx.run = scale, below, run
        ctx.save_for_backward(x, shortcut, weight, bias, mean, deviation, a, d, *of_gate)
        return _activated(x, shortcut, a, d, scale, below)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        x, shortcut, weight, bias, mean, deviation, a, d, *of_gate = ctx.saved_tensors
        images, size = len(x), x.shape[2] * x.shape[3]
        run, channels, factor = ctx.run, x.shape[1], weight * deviation
        seen = (_flat(gradient), _flat(x), *_added(x, shortcut, a, d, ctx.scale), ctx.below)
        total, product = (weight.new_empty(images if ctx.gates_back else min(run.ROWS, images), channels) for _ in range(2))
        run.gradient_sums(*seen, mean, total, product)
        by_back, by_image, of_parameters = factor[None], None, [None] * len(of_gate)
        if ctx.gates_back:
            by_back, by_image, of_parameters = ctx.gates_back(total, product, factor, bias, size)
        of_weight, of_bias, of_value, constant = run.gradient_statistics(total, product, weight, mean, deviation, images * size)
        constant = constant[None] if by_image is None else by_image + constant
        of_x = torch.empty_like(x)
        of_shortcut = None if shortcut is None else torch.empty_like(shortcut)
        run.gradients(*seen, of_value, constant, by_back, _flat(of_x), _flat(of_x if shortcut is None else of_shortcut))
        return None, None, None, None, of_x, of_shortcut, of_weight, of_bias, *of_parameters


def _gates_by(run, gate: nn.Module) -> tuple:
    """Squeeze-and-excitation there and back: the passes' own where they have it for this gate, else by torch."""
    return (run.gates, run.gates_back) if hasattr(run, "gates") and run.takes_gate(gate) else (_gates, _gates_back)


def _gates(gate: nn.Module, total: torch.Tensor, pivot: torch.Tensor, mean: torch.Tensor, factor: torch.Tensor, rest: torch.Tensor,
           bias: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, tuple]:
    """The gates of images of `size` pixels, normalised as factor * x + rest, from the sums (B, C) of their x - pivot: gate * factor and gate
    * rest, (B, C) each, and what `_gates_back` takes."""
    from_mean = total / size + (pivot - mean)    # of each image
    mean_of_image = from_mean * factor + bias
    with torch.enable_grad():
        gates = gate.gate(mean_of_image.requires_grad_())
    return factor * gates.detach(), rest * gates.detach(), (from_mean, mean_of_image, gates)


def _gates_back(gate: nn.Module, kept: tuple, total: torch.Tensor, product: torch.Tensor, factor: torch.Tensor, bias: torch.Tensor,
                size: int) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Factors (B, C) of what comes back, and what is added to it, an image; the gradients of the gate's parameters, None of those that have
    none. total and product (B, C), sums of what comes back, are made those that the statistics take."""
    from_mean, mean_of_image, gates = kept
    parameters = list(gate.parameters())
    wanted = [i for i, parameter in enumerate(parameters) if parameter.requires_grad]
    of_mean, *found = torch.autograd.grad(gates, [mean_of_image, *(parameters[i] for i in wanted)],
                                          (factor * product + bias * total).to(gates.dtype), retain_graph=True)
    of_parameters = [None] * len(parameters)
    for i, of_parameter in zip(wanted, found):
        of_parameters[i] = of_parameter
    gates = gates.detach().float()
    total.mul_(gates).add_(of_mean)
    product.mul_(gates).addcmul_(of_mean, from_mean)
    return gates * factor, of_mean * (factor / size), of_parameters


def _flat(images: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) with pixels in a row, (B, H * W, C): the same memory where that is channels-last, a copy elsewhere."""
    return images.permute(0, 2, 3, 1).contiguous().view(len(images), -1, images.shape[1])
