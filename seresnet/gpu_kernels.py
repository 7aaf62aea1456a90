"""The passes of seresnet/kernels.py for a GPU, in Triton: max-pooling, batch normalisation with what follows it.

Images are bfloat16, float16 or float32 tensors (B, H, W, C) or, with pixels in a row, (B, P, C), contiguous, of fewer than 2^31
elements, less a few; what is counted about them is float32. A program takes PIXELS pixels of CHANNELS channels, or for sums as many in another
shape. Sums are taken in an order that depends on shapes alone.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from triton import language as tl

from seresnet.gelu import SATURATED, gelu_slope_above_half, normal_share_above_half, odd_polynomial

PIXELS, CHANNELS = 64, 32    # at a time: 64 bytes of a bfloat16 pixel, two sectors of memory, and no waste with 96 or 288 channels
FEW = 8                      # channels at a time where there are only sums to add up: more programs, each of a shorter way
ROWS = 512                   # parts in which sums over the batch are taken, where no images have sums of their own
COUNTS = ["rows", "images", "size", "count", "height", "width"]    # no code of its own for each value of these

END, PER_SQUARE = tl.constexpr(SATURATED), tl.constexpr(2 / SATURATED**2)
P0, P1, P2, P3, P4, P5, P6, P7, P8 = (tl.constexpr(float(c)) for c in odd_polynomial(normal_share_above_half))
S0, S1, S2, S3, S4, S5, S6, S7, S8 = (tl.constexpr(float(c)) for c in odd_polynomial(gelu_slope_above_half))

# Numbers and flags are arguments, but for tl.constexpr, of which there is one machine code each.


@triton.jit
def tile(pixels, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of this program: pixels (PIXELS, 1), channels (1, CHANNELS), and whether they are there. Neighbours share pixels."""
    tiles = tl.cdiv(channels, CHANNELS)
    pixel = (tl.program_id(0) // tiles) * PIXELS + tl.arange(0, PIXELS)
    channel = (tl.program_id(0) % tiles) * CHANNELS + tl.arange(0, CHANNELS)
    return pixel[:, None], channel[None, :], (pixel < pixels)[:, None] & (channel < channels)[None, :]


@triton.jit
def part(rows, images, size, channels, CHANNELS: tl.constexpr):
    """Of this program: its row of sums, the first pixel of that and the one behind its last, channels (1, CHANNELS), whether they are."""
    tiles = tl.cdiv(channels, CHANNELS)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    channel = (tl.program_id(0) % tiles) * CHANNELS + tl.arange(0, CHANNELS)
    first, last = (row * images // rows * size).to(tl.int32), ((row + 1) * images // rows * size).to(tl.int32)
    return row, first, last, channel[None, :], (channel < channels)[None, :]


@triton.jit
def before_activation(value, shortcut, a, d, place, there, scale, ADDED: tl.constexpr):
    """What the activation is taken of."""
    u = a * value + d
    if ADDED:
        u += scale * tl.load(shortcut + place, there, other=0).to(tl.float32)
    return u


@triton.jit
def bell_and_share(u):
    """exp(-u^2 / 2), and the share of a standard normal distribution below u: gelu(u) is u times that (Hendrycks and Gimpel, arXiv
    1606.08415). Within 4e-7 in float32, by Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26; erf takes twice the instructions."""
    bell, t = tl.exp(-0.5 * u * u), 1.0 / (1.0 + 0.2316418884 * tl.abs(u))
    beyond = ((((0.5307027145 * t - 0.7265760135) * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796) * t * bell
    return bell, tl.where(u < 0, beyond, 1.0 - beyond)


@triton.jit
def half_more(u, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, C3: tl.constexpr, C4: tl.constexpr, C5: tl.constexpr,
              C6: tl.constexpr, C7: tl.constexpr, C8: tl.constexpr):
    """Half more than the odd polynomial of these coefficients (gelu.odd_polynomial), at u."""
    u = tl.minimum(tl.maximum(u, -END), END)
    v = u * u * PER_SQUARE - 1.0
    return 0.5 + u * (C0 + v * (C1 + v * (C2 + v * (C3 + v * (C4 + v * (C5 + v * (C6 + v * (C7 + v * C8))))))))


@triton.jit
def activated(u, BELOW: tl.constexpr, ROUGH: tl.constexpr):
    """As kernels.activated. ROUGH, for bfloat16: GELU within 4e-5 of u, by a polynomial."""
    if BELOW is not None:
        result = tl.where(u <= 0, BELOW * u if BELOW != 0 else 0.0, u)
    elif ROUGH:
        result = u * half_more(u, P0, P1, P2, P3, P4, P5, P6, P7, P8)
    else:
        _, share = bell_and_share(u)
        result = u * share
    return result


@triton.jit
def back_through(gradient, u, BELOW: tl.constexpr, ROUGH: tl.constexpr):
    """As kernels.back_through. ROUGH: GELU's derivative within 6e-4, where half of bfloat16's step at 1 is 2e-3; that of NaN is some number."""
    if BELOW is not None:
        result = tl.where(u <= 0, BELOW * gradient if BELOW != 0 else 0.0, gradient)
    elif ROUGH:
        result = gradient * half_more(u, S0, S1, S2, S3, S4, S5, S6, S7, S8)
    else:
        bell, share = bell_and_share(u)
        result = gradient * (share + 0.3989422804014327 * u * bell)
    return result


@triton.jit(do_not_specialize=COUNTS)
def _pool(x, pooled, taken, count, height, width, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    cell, channel, there = tile(count, channels, PIXELS, CHANNELS)
    tall, wide = height // 2, width // 2
    corner = (cell // (tall * wide) * height + cell // wide % tall * 2) * width + cell % wide * 2
    best = tl.load(x + corner * channels + channel, there, other=0)
    place = tl.zeros([PIXELS, CHANNELS], tl.uint8)
    for k in tl.static_range(1, 4):
        value = tl.load(x + (corner + k // 2 * width + k % 2) * channels + channel, there, other=0)
        higher = (value.to(tl.float32) > best.to(tl.float32)) | (value.to(tl.float32) != value.to(tl.float32))    # as torch's: the first of equal ones, the last NaN
        best, place = tl.where(higher, value, best), tl.where(higher, k, place).to(tl.uint8)
    tl.store(pooled + cell * channels + channel, best, there)
    tl.store(taken + cell * channels + channel, place, there)


@triton.jit(do_not_specialize=COUNTS)
def _unpool(gradient, taken, spread, count, height, width, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Also of the cells of an odd last row or column, which are cut off and were not pooled."""
    cell, channel, there = tile(count, channels, PIXELS, CHANNELS)
    cells_down, cells_across = (height + 1) // 2, (width + 1) // 2
    image, i, j = cell // (cells_down * cells_across), cell // cells_across % cells_down, cell % cells_across
    pooled = there & (i < height // 2) & (j < width // 2)
    source = ((image * (height // 2) + i) * (width // 2) + j) * channels + channel
    value, place = tl.load(gradient + source, pooled, other=0), tl.load(taken + source, pooled, other=4)
    for k in tl.static_range(4):
        row, column = 2 * i + k // 2, 2 * j + k % 2
        tl.store(spread + ((image * height + row) * width + column) * channels + channel,
                 tl.where(place == k, value, 0.0).to(value.dtype), there & (row < height) & (column < width))


@triton.jit(do_not_specialize=COUNTS)
def _sums(x, pivot, total, squares, rows, images, size, channels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    row, first, last, channel, inside = part(rows, images, size, channels, CHANNELS)
    middle = tl.load(pivot + channel, inside, other=0)
    sum_, square = tl.zeros([PIXELS, CHANNELS], tl.float32), tl.zeros([PIXELS, CHANNELS], tl.float32)
    for start in range(first, last, PIXELS):
        pixel = start + tl.arange(0, PIXELS)[:, None]
        there = (pixel < last) & inside
        value = tl.load(x + pixel * channels + channel, there, other=0).to(tl.float32)
        value = tl.where(there, value - middle, 0.0)
        sum_ += value
        square += value * value
    tl.store(total + row * channels + channel, tl.sum(sum_, 0)[None, :], inside)
    tl.store(squares + row * channels + channel, tl.sum(square, 0)[None, :], inside)


@triton.jit
def of_channel(values, other, rows, channels, channel, inside, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Sums of two arrays (rows, channels) of float32 over their rows: float64 (1, CHANNELS) each."""
    first, second = tl.zeros([CHANNELS], tl.float64), tl.zeros([CHANNELS], tl.float64)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        there = (row < rows) & inside
        first += tl.sum(tl.load(values + row * channels + channel, there, other=0).to(tl.float64), 0)
        second += tl.sum(tl.load(other + row * channels + channel, there, other=0).to(tl.float64), 0)
    return first[None, :], second[None, :]


@triton.jit(do_not_specialize=COUNTS)
def _statistics(total, squares, pivot, weight, bias, running_mean, running_var, tracked, mean, deviation, a, d, rows, count, channels,
                momentum, eps, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    channel = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    inside = channel < channels
    sum_, square = of_channel(total, squares, rows, channels, channel, inside, ROWS, CHANNELS)
    number = (tl.zeros([1, CHANNELS], tl.int64) + count).to(tl.float64)
    shift = sum_ / number
    variance = tl.maximum(square / number - shift * shift, 0.0)
    middle = (tl.load(pivot + channel, inside, other=0) + shift).to(tl.float32)
    spread = (1.0 / tl.sqrt(variance + eps)).to(tl.float32)
    for_one = tl.load(weight + channel, inside, other=0) * spread
    tl.store(mean + channel, middle, inside)
    tl.store(deviation + channel, spread, inside)
    tl.store(a + channel, for_one, inside)
    tl.store(d + channel, tl.load(bias + channel, inside, other=0) - middle * for_one, inside)
    before = tl.load(running_mean + channel, inside, other=0)
    tl.store(running_mean + channel, before + momentum * (middle - before), inside)
    before = tl.load(running_var + channel, inside, other=0)
    unbiased = (variance * (number / (number - 1))).to(tl.float32)
    tl.store(running_var + channel, before + momentum * (unbiased - before), inside)
    if tl.program_id(0) == 0:
        tl.store(tracked, tl.load(tracked) + 1)


@triton.jit(do_not_specialize=COUNTS)
def _activate(x, shortcut, a, d, y, scale, count, size, channels, per_image, ADDED: tl.constexpr, BELOW: tl.constexpr,
              PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    pixel, channel, there = tile(count, channels, PIXELS, CHANNELS)
    place, factor = pixel * channels + channel, pixel // size * per_image + channel
    value = tl.load(x + place, there, other=0).to(tl.float32)
    u = before_activation(value, shortcut, tl.load(a + factor, there, other=0), tl.load(d + factor, there, other=0), place, there, scale, ADDED)
    tl.store(y + place, activated(u, BELOW, x.dtype.element_ty == tl.bfloat16), there)


@triton.jit(do_not_specialize=COUNTS)
def _gradient_sums(gradient, x, shortcut, a, d, mean, total, product, scale, rows, images, size, channels, per_image,
                   ADDED: tl.constexpr, BELOW: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    row, first, last, channel, inside = part(rows, images, size, channels, CHANNELS)
    factor = row * per_image + channel    # where images have factors of their own, a row is an image
    middle, for_one, rest = (tl.load(mean + channel, inside, other=0), tl.load(a + factor, inside, other=0), tl.load(d + factor, inside, other=0))
    sum_, moment = tl.zeros([PIXELS, CHANNELS], tl.float32), tl.zeros([PIXELS, CHANNELS], tl.float32)
    for start in range(first, last, PIXELS):
        pixel = start + tl.arange(0, PIXELS)[:, None]
        there = (pixel < last) & inside
        place = pixel * channels + channel
        value = tl.load(x + place, there, other=0).to(tl.float32)
        u = before_activation(value, shortcut, for_one, rest, place, there, scale, ADDED)
        back = back_through(tl.load(gradient + place, there, other=0).to(tl.float32), u, BELOW, x.dtype.element_ty == tl.bfloat16)    # 0 where nothing is
        sum_ += back
        moment += back * (value - middle)
    tl.store(total + row * channels + channel, tl.sum(sum_, 0)[None, :], inside)
    tl.store(product + row * channels + channel, tl.sum(moment, 0)[None, :], inside)


@triton.jit(do_not_specialize=COUNTS)
def _gradient_statistics(total, product, weight, mean, deviation, of_weight, of_bias, of_value, constant, rows, count, channels,
                         ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    channel = (tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    inside = channel < channels
    sum_, moment = of_channel(total, product, rows, channels, channel, inside, ROWS, CHANNELS)
    number = (tl.zeros([1, CHANNELS], tl.int64) + count).to(tl.float64)
    spread = tl.load(deviation + channel, inside, other=0)
    factor, by_weight = tl.load(weight + channel, inside, other=0) * spread, (moment * spread).to(tl.float32)
    of_one = -factor * spread * (by_weight / number).to(tl.float32)
    tl.store(of_weight + channel, by_weight, inside)
    tl.store(of_bias + channel, sum_.to(tl.float32), inside)
    tl.store(of_value + channel, of_one, inside)
    tl.store(constant + channel, -factor * (sum_ / number).to(tl.float32) - of_one * tl.load(mean + channel, inside, other=0), inside)


@triton.jit(do_not_specialize=COUNTS)
def _gradients(gradient, x, shortcut, a, d, of_value, constant, by_back, of_x, of_shortcut, scale, count, size, channels, per_image,
               ADDED: tl.constexpr, BELOW: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    pixel, channel, there = tile(count, channels, PIXELS, CHANNELS)
    place, factor = pixel * channels + channel, pixel // size * per_image + channel
    value = tl.load(x + place, there, other=0).to(tl.float32)
    u = before_activation(value, shortcut, tl.load(a + factor, there, other=0), tl.load(d + factor, there, other=0), place, there, scale, ADDED)
    back = back_through(tl.load(gradient + place, there, other=0).to(tl.float32), u, BELOW, x.dtype.element_ty == tl.bfloat16)
    result = tl.load(by_back + factor, there, other=0) * back + tl.load(of_value + channel, there, other=0) * value
    tl.store(of_x + place, result + tl.load(constant + factor, there, other=0), there)
    if ADDED:
        tl.store(of_shortcut + place, scale * back, there)


@triton.jit(do_not_specialize=COUNTS)
def _gates(total, pivot, mean, factor, rest, bias, squeeze, of_squeeze, excite, of_excite, means, hidden, gates, a, d, images, share, channels,
           units, IMAGES: tl.constexpr, CHANNELS: tl.constexpr, UNITS: tl.constexpr):
    """squeeze (units, channels), excite (channels, units): SE's maps; of_squeeze, of_excite: their biases."""
    image, unit = (tl.program_id(0) * IMAGES + tl.arange(0, IMAGES))[:, None], tl.arange(0, UNITS)
    inner = tl.zeros([IMAGES, UNITS], tl.float32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        row, column, inside = channel[None, :], channel[:, None], (channel < channels)[None, :]
        there = (image < images) & inside
        from_mean = tl.load(total + image * channels + row, there, other=0) * share + (tl.load(pivot + row, inside, other=0)
                                                                                      - tl.load(mean + row, inside, other=0))
        value = from_mean * tl.load(factor + row, inside, other=0) + tl.load(bias + row, inside, other=0)
        tl.store(means + image * channels + row, value, there)
        weights = tl.load(squeeze + unit[None, :] * channels + column, (unit < units)[None, :] & (column < channels), other=0)
        inner = tl.dot(tl.where(there, value, 0.0), weights, inner, input_precision="ieee")
    inner += tl.load(of_squeeze + unit, unit < units, other=0)[None, :]
    inner = tl.where(inner < 0, 0.0, inner)    # NaN stays
    tl.store(hidden + image * units + unit[None, :], inner, (image < images) & (unit < units)[None, :])
    for start in range(0, channels, CHANNELS):
        row = (start + tl.arange(0, CHANNELS))[None, :]
        inside = row < channels
        place, there = image * channels + row, (image < images) & inside
        weights = tl.load(excite + row * units + unit[:, None], (unit < units)[:, None] & inside, other=0)
        gate = tl.sigmoid(tl.dot(inner, weights, input_precision="ieee") + tl.load(of_excite + row, inside, other=0))
        tl.store(gates + place, gate, there)
        tl.store(a + place, gate * tl.load(factor + row, inside, other=0), there)
        tl.store(d + place, gate * tl.load(rest + row, inside, other=0), there)


@triton.jit(do_not_specialize=COUNTS)
def _gates_back(total, product, seen, pivot, mean, factor, bias, squeeze, excite, hidden, gates, by_back, by_image, of_excited, of_squeezed,
                images, share, channels, units, IMAGES: tl.constexpr, CHANNELS: tl.constexpr, UNITS: tl.constexpr):
    """of_excited (images, channels), of_squeezed (images, units): gradients of what either map gives, ahead of the sigmoid and of ReLU."""
    image, unit = (tl.program_id(0) * IMAGES + tl.arange(0, IMAGES))[:, None], tl.arange(0, UNITS)
    inner = tl.zeros([IMAGES, UNITS], tl.float32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        row, column, inside = channel[None, :], channel[:, None], (channel < channels)[None, :]
        place, there = image * channels + row, (image < images) & inside
        gate, scale = tl.load(gates + place, there, other=0), tl.load(factor + row, inside, other=0)
        back = (scale * tl.load(product + place, there, other=0)
                + tl.load(bias + row, inside, other=0) * tl.load(total + place, there, other=0)) * gate * (1.0 - gate)
        tl.store(of_excited + place, back, there)
        tl.store(by_back + place, gate * scale, there)
        weights = tl.load(excite + column * units + unit[None, :], (unit < units)[None, :] & (column < channels), other=0)
        inner = tl.dot(back, weights, inner, input_precision="ieee")
    of_unit, used = image * units + unit[None, :], (image < images) & (unit < units)[None, :]
    inner = tl.where(tl.load(hidden + of_unit, used, other=0) > 0, inner, 0.0)
    tl.store(of_squeezed + of_unit, inner, used)
    for start in range(0, channels, CHANNELS):
        row = (start + tl.arange(0, CHANNELS))[None, :]
        inside = row < channels
        place, there = image * channels + row, (image < images) & inside
        weights = tl.load(squeeze + unit[:, None] * channels + row, (unit < units)[:, None] & inside, other=0)
        of_mean = tl.dot(inner, weights, input_precision="ieee")
        from_mean = tl.load(seen + place, there, other=0) * share + (tl.load(pivot + row, inside, other=0) - tl.load(mean + row, inside, other=0))
        gate = tl.load(gates + place, there, other=0)
        tl.store(by_image + place, of_mean * (tl.load(factor + row, inside, other=0) * share), there)
        tl.store(total + place, gate * tl.load(total + place, there, other=0) + of_mean, there)
        tl.store(product + place, gate * tl.load(product + place, there, other=0) + of_mean * from_mean, there)


def pool(x: torch.Tensor, pooled: torch.Tensor, taken: torch.Tensor) -> None:
    """As kernels.pool."""
    _, height, width, channels = x.shape
    cells = pooled.numel() // channels
    _run(_pool, _tiles(cells), channels, x, pooled, taken, cells, height, width, channels, PIXELS=PIXELS)


def unpool(gradient: torch.Tensor, taken: torch.Tensor, spread: torch.Tensor) -> None:
    """As kernels.unpool."""
    images, height, width, channels = spread.shape
    cells = images * ((height + 1) // 2) * ((width + 1) // 2)
    _run(_unpool, _tiles(cells), channels, gradient, taken, spread, cells, height, width, channels, PIXELS=PIXELS)


def sums(x: torch.Tensor, pivot: torch.Tensor, total: torch.Tensor, squares: torch.Tensor) -> None:
    """As kernels.sums."""
    (images, size, channels), rows = x.shape, len(total)
    _run(_sums, rows, channels, x, pivot, total, squares, rows, images, size, channels, **_shape(size, images, rows, channels))


def statistics(norm: torch.nn.BatchNorm2d, total: torch.Tensor, squares: torch.Tensor, pivot: torch.Tensor,
               count: int) -> tuple[torch.Tensor, ...]:
    """As compiled.statistics."""
    mean, deviation, a, d = torch.empty(4, total.shape[1], dtype=torch.float32, device=total.device)
    _run(_statistics, 1, len(mean), total, squares, pivot, norm.weight, norm.bias, norm.running_mean, norm.running_var,
         norm.num_batches_tracked, mean, deviation, a, d, len(total), count, len(mean), norm.momentum, norm.eps, ROWS=512, CHANNELS=FEW)
    return mean, deviation, a, d


def activate(x, shortcut, a, d, scale: float, below: float | None, y) -> None:
    """As kernels.activate."""
    images, size, channels = x.shape
    _run(_activate, _tiles(images * size), channels, x, shortcut, a, d, y, scale, images * size, size, channels, _per_image(a),
         ADDED=scale != 0, BELOW=below, PIXELS=PIXELS)


def gradient_sums(gradient, x, shortcut, a, d, scale: float, below: float | None, mean, total, product) -> None:
    """As kernels.gradient_sums. Where images have factors of their own in a and d, they have sums of their own."""
    (images, size, channels), rows = x.shape, len(total)
    assert rows == images or len(a) == 1
    _run(_gradient_sums, rows, channels, gradient, x, shortcut, a, d, mean, total, product, scale, rows, images, size, channels,
         _per_image(a), ADDED=scale != 0, BELOW=below, **_shape(size, images, rows, channels))


def gradient_statistics(total, product, weight, mean, deviation, count: int) -> tuple[torch.Tensor, ...]:
    """As compiled.gradient_statistics."""
    results = torch.empty(4, len(mean), dtype=torch.float32, device=mean.device)
    _run(_gradient_statistics, 1, len(mean), total, product, weight, mean, deviation, *results, len(total), count, len(mean), ROWS=512,
         CHANNELS=FEW)
    return tuple(results)


def gradients(gradient, x, shortcut, a, d, scale: float, below: float | None, of_value, constant, by_back, of_x, of_shortcut) -> None:
    """As kernels.gradients."""
    images, size, channels = x.shape
    _run(_gradients, _tiles(images * size), channels, gradient, x, shortcut, a, d, of_value, constant, by_back, of_x, of_shortcut, scale,
         images * size, size, channels, _per_image(a), ADDED=scale != 0, BELOW=below, PIXELS=PIXELS)


class Gating(NamedTuple):
    """What the way back through squeeze-and-excitation takes of the way there."""

    seen: torch.Tensor    # (B, C): sums of x - pivot over each image
    pivot: torch.Tensor
    mean: torch.Tensor
    means: torch.Tensor    # (B, C): of the normalised images, what is squeezed
    hidden: torch.Tensor    # (B, units): behind ReLU
    gates: torch.Tensor    # (B, C)


def takes_gate(gate: torch.nn.Module) -> bool:
    """Whether `gates` computes this SqueezeExcitation: of float32, all of it trained, with few units."""
    return gate.squeeze.out_features <= 64 and all(p.dtype == torch.float32 and p.requires_grad and p.is_contiguous()
                                                     for p in gate.parameters())


def gates(gate: torch.nn.Module, total: torch.Tensor, pivot: torch.Tensor, mean: torch.Tensor, factor: torch.Tensor, rest: torch.Tensor,
          bias: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, Gating]:
    """The gates of images of `size` pixels, normalised as factor * x + rest, from the sums (B, C) of their x - pivot: gate * factor and gate
    * rest, (B, C) each, and what `gates_back` takes. All of it is float32."""
    images, channels = total.shape
    means, found, a, d = torch.empty(4, images, channels, dtype=torch.float32, device=total.device)
    hidden = torch.empty(images, gate.squeeze.out_features, dtype=torch.float32, device=total.device)
    _run_on_images(_gates, hidden, channels, total, pivot, mean, factor, rest, bias, gate.squeeze.weight, gate.squeeze.bias, gate.excite.weight,
                   gate.excite.bias, means, hidden, found, a, d, size=size)
    return a, d, Gating(total, pivot.clone(), mean, means, hidden, found)    # in float32 the pivot is a part of x, which is not to be kept by it


def gates_back(gate: torch.nn.Module, kept: Gating, total: torch.Tensor, product: torch.Tensor, factor: torch.Tensor, bias: torch.Tensor,
               size: int) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """by_back and by_image (B, C) of `gradients`, and the gradients of the gate's parameters. total and product (B, C): what `gradient_sums`
    gives, made here what the statistics take."""
    by_back, by_image, of_excited = torch.empty(3, *total.shape, dtype=torch.float32, device=total.device)
    of_squeezed = torch.empty_like(kept.hidden)
    _run_on_images(_gates_back, kept.hidden, total.shape[1], total, product, kept.seen, kept.pivot, kept.mean, factor, bias, gate.squeeze.weight,
                   gate.excite.weight, kept.hidden, kept.gates, by_back, by_image, of_excited, of_squeezed, size=size)
    return by_back, by_image, [of_squeezed.T @ kept.means, of_squeezed.sum(0), of_excited.T @ kept.hidden, of_excited.sum(0)]


def _run_on_images(kernel, hidden: torch.Tensor, channels: int, *arguments, size: int) -> None:
    """A program for every 16 images, the fewest that a matrix product takes."""
    images, units = hidden.shape
    if images:
        with torch.cuda.device_of(hidden):
            kernel[(triton.cdiv(images, 16),)](*arguments, images, 1 / size, channels, units, IMAGES=16, CHANNELS=64,
                                               UNITS=max(16, triton.next_power_of_2(units)))


def _per_image(a: torch.Tensor) -> int:
    """From one image's row to the next one's in a, (1, C) or (B, C)."""
    return a.shape[1] if len(a) > 1 else 0


def _tiles(pixels: int) -> int:
    """How many times PIXELS they are, the last perhaps in part."""
    return triton.cdiv(pixels, PIXELS)


def _shape(size: int, images: int, rows: int, channels: int) -> dict[str, int]:
    """How many pixels and channels a program takes at a time of a row of sums: fewer pixels, and more channels, where a row has few, of a
    small image, since the rest of the program would idle."""
    pixels = size * (images // max(1, rows))
    shapes = [(PIXELS >> k, CHANNELS << k) for k in range(3)]
    least = min(triton.cdiv(pixels, tall) * tall * triton.cdiv(channels, wide) * wide for tall, wide in shapes)
    for tall, wide in shapes:    # the tallest that does not idle much: it goes round less often
        if triton.cdiv(pixels, tall) * tall * triton.cdiv(channels, wide) * wide <= 1.5 * least:
            break
    return {"PIXELS": tall, "CHANNELS": wide}


def _run(kernel, tiles: int, channels: int, *arguments, CHANNELS: int = CHANNELS, **constants) -> None:
    """`tiles` programs for every CHANNELS, on the device of the arguments."""
    programs = tiles * triton.cdiv(channels, CHANNELS)
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **constants, CHANNELS=CHANNELS)
