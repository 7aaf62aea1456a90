"""Convolutions: torch's, and faster ones on CPUs: where images are small and the CPU has matrix units, and in float32."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from seresnet.compiled import has_matrix_units
from seresnet.winograd import Winograd, pays

ROW = 32               # pixels that a matrix unit (AMX, bfloat16) sums over at once
LARGEST_PERIOD = 14    # two of 14 nearly fill a row; laying wider images side by side costs more than it saves
LONG_ROW = 64          # pixels in a row where all of a convolution is computed side by side: the weights are read once a row
NARROW = 4             # pixels of width up to which that pays with any number of weights
MANY_WEIGHTS, NARROW_WITH_MANY = 1 << 20, 7    # with more than 2 MB of them, more than a core's cache holds, up to here


class Conv2d(nn.Conv2d):
    """A convolution that keeps the side (divided by stride), without a bias: batch normalisation follows.

    (B, C_in, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1):
        super().__init__(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return convolve(x, self.weight, self.stride[0], self.padding[0])


class ConvBeforePool(Conv2d):
    """A 3x3 convolution of which 2x2 pooling takes the output: (B, C_in, H, W) -> (B, C_out, H, W) without what pooling drops.

    Of an odd side pooling drops the last row and column. They are not computed here: the same values where pooling looks, for
    13% less arithmetic at 15 x 15 pixels and 27% less at 7 x 7 (5% and 3% less time, records/: towards se94).
    """

    def __init__(self, c_in: int, c_out: int):
        super().__init__(c_in, c_out, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        odd_height, odd_width = x.shape[2] % 2, x.shape[3] % 2
        if not (odd_height or odd_width) or min(x.shape[2:]) < 2:
            return super().forward(x)
        if pays(x, self.weight, stride=1):
            return Winograd.apply(x, self.weight, 1, x.shape[2] - odd_height, x.shape[3] - odd_width)
        return convolve(F.pad(x, (1, 1 - odd_width, 1, 1 - odd_height)), self.weight, stride=1, padding=0)


def convolve(x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int) -> torch.Tensor:
    """F.conv2d of x (B, C_in, H, W) and weight (C_out, C_in, k, k), by SideBySide, SideBySideThroughout or Winograd where that is faster."""
    trains = weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if trains and x.dtype == torch.bfloat16 and x.device.type == "cpu" and has_matrix_units():
        way = faster_way(x.shape[3], weight, stride, padding)
        if way:
            return way.apply(x, weight.to(x.dtype), padding)
    if pays(x, weight, stride):
        return Winograd.apply(x, weight, padding, x.shape[2] + 2 * padding - 2, x.shape[3] + 2 * padding - 2)
    return F.conv2d(x, weight, None, stride, padding)


def faster_way(width: int, weight: torch.Tensor, stride: int, padding: int) -> type[torch.autograd.Function] | None:
    """How images of `width` pixels are convolved faster in training, on a CPU with matrix units: measured by benchmarks/convolutions.py."""
    if weight.shape[2:] != (3, 3) or stride != 1 or width + padding > LARGEST_PERIOD:
        return None
    return SideBySideThroughout if padding == 1 and width <= (NARROW_WITH_MANY if weight.numel() > MANY_WEIGHTS else NARROW) else SideBySide


class SideBySide(torch.autograd.Function):
    """3x3 convolution whose gradient by the weights takes several images as one wide one.

    That gradient sums over pixels, and oneDNN's kernel for matrix units sums over a row of one image at a time: a row of six
    pixels leaves four fifths of a unit's 32 idle. With images laid side by side, zeros between them, rows are long enough; the sum
    is the same. 1.4 to 4.5 times faster for 256 channels and 12 to 3 pixels a side (records/: matrix units).
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, padding: int) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return F.conv2d(x, weight, padding=padding)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = torchs_gradients(gradient, x, weight, ctx.padding, ctx.padding, (True, False, False))[0]
        if ctx.needs_input_grad[1]:
            of_weight = weight_gradient(gradient, x, weight, ctx.padding)
        return of_x, of_weight, None


class SideBySideThroughout(torch.autograd.Function):
    """3x3 convolution, padded by one, that takes several images as one wide one forwards and for both gradients.

    oneDNN reads all weights for every row of an image: with 384 channels they are 2.7 MB, more than a core's cache, and three or
    six pixels do not pay for that. With 384 channels 1.1 to 1.8 times faster than SideBySide, copies included (records/: se95).
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, padding: int) -> torch.Tensor:
        period = x.shape[3] + 1
        ctx.layout = len(x), LONG_ROW // period, period
        rows = side_by_side(x, LONG_ROW // period, period, 0)
        ctx.save_for_backward(rows, weight)
        return apart(F.conv2d(rows, weight, padding=1), *ctx.layout)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor):
        rows, weight = ctx.saved_tensors
        gradient = side_by_side(gradient, *ctx.layout[1:], 0)
        of_rows, of_weight, _ = torchs_gradients(gradient, rows, weight, 1, 1, (*ctx.needs_input_grad[:2], False))
        return apart(of_rows, *ctx.layout) if ctx.needs_input_grad[0] else None, of_weight, None


def weight_gradient(gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, padding: int) -> torch.Tensor:
    """The gradient of a 3x3 convolution of x (B, C_in, H, W), padding 0 or 1, by its weight (C_out, C_in, 3, 3), from that of its
    output, (B, C_out, H, W) with padding and two pixels less a side without. Of images no wider than ROW - padding."""
    period = x.shape[3] + padding    # from one image to the next, so that the filter sees no two of them: they share padding
    row = ROW // period
    gradient, x = side_by_side(gradient, row, period, 1 - padding), side_by_side(x, row, period, 0)
    return torchs_gradients(gradient, x, weight, padding, 1, (False, True, False))[1]


def torchs_gradients(gradient, x, weight, down: int, right: int, wanted: tuple[bool, bool, bool]):
    """torch's own gradients of F.conv2d, padded by `down` and `right` pixels: by x, weight and bias, those that are wanted."""
    return torch.ops.aten.convolution_backward(gradient, x, weight, None, [1, 1], [down, right], [1, 1], False, [0, 0], 1, wanted)


def side_by_side(images: torch.Tensor, row: int, period: int, first: int) -> torch.Tensor:
    """(B, C, H, W) -> (ceil(B / row), C, H, row * period), channels-last: `row` images in one, each begun `first` pixels into its
    `period`, zeros everywhere else."""
    count, channels, height, width = images.shape
    whole, rest = divmod(count, row)
    rows = images.new_empty(whole + (rest > 0), height, row, period, channels)
    rows[..., :first, :].zero_()
    rows[..., first + width:, :].zero_()
    places, images = rows[..., first:first + width, :], images.permute(0, 2, 3, 1)
    places[:whole].copy_(images[:count - rest].unflatten(0, (whole, row)).transpose(1, 2))
    if rest:
        places[whole, :, :rest].copy_(images[count - rest:].transpose(0, 1))
        places[whole, :, rest:].zero_()
    return rows.view(len(rows), height, row * period, channels).permute(0, 3, 1, 2)


def apart(rows: torch.Tensor, count: int, row: int, period: int) -> torch.Tensor:
    """The `count` images (B, C, H, period - 1), channels-last, that lie in rows (N, C, H, row * period) as `side_by_side` lays them
    from the first pixel of their period."""
    rows = rows.permute(0, 2, 3, 1).unflatten(2, (row, period))[:, :, :, :period - 1]
    return rows.transpose(1, 2).flatten(0, 1)[:count].contiguous().permute(0, 3, 1, 2)
