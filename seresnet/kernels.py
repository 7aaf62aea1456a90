"""Passes over images in memory, for numba to compile: max-pooling, batch normalisation with what follows it, tiles of convolutions.

bfloat16 comes as an int16 array of its bits, since numba does not know it: the upper half of a float32's. float32 comes as an int32
array of its bits, so that one pass serves both; tiles are float32 alone, and come as that. Images are (B, H, W, C) or, with pixels in
a row, (B, P, C); all arrays are contiguous. Loops over channels are innermost, so that they become vector instructions.
"""
from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import float32, int16, int32, types, uint8, uint32, uintp
from numba.extending import intrinsic, overload

from seresnet.gelu import SATURATED, SATURATED_FINE, gelu_slope_above_half, normal_share_above_half, odd_polynomial

ZERO, HALF, ONE, END, PER_SQUARE = np.float32(0), np.float32(0.5), np.float32(1), np.float32(SATURATED), np.float32(2 / SATURATED**2)
END_FINE, PER_SQUARE_FINE = np.float32(SATURATED_FINE), np.float32(2 / SATURATED_FINE**2)
P0, P1, P2, P3, P4, P5, P6, P7, P8 = odd_polynomial(normal_share_above_half)
S0, S1, S2, S3, S4, S5, S6, S7, S8 = odd_polynomial(gelu_slope_above_half)
FINE = 14    # degree in float32
SHARE, SLOPE = (np.array(odd_polynomial(f, FINE, SATURATED_FINE)) for f in (normal_share_above_half, gelu_slope_above_half))


@intrinsic
def as_float(typing, bits):
    return float32(types.uint32), lambda context, builder, signature, values: builder.bitcast(values[0], ir.FloatType())


@intrinsic
def as_bits(typing, number):
    return uint32(types.float32), lambda context, builder, signature, values: builder.bitcast(values[0], ir.IntType(32))


@numba.njit(inline="always")
def widen(bits):
    """The float32 of a bfloat16's bits."""
    return as_float(uint32(uint32(bits) << uint32(16)))


@numba.njit(inline="always")
def narrow(number):
    """A float32's nearest bfloat16, as bits; to even from the middle."""
    bits = as_bits(number)
    return int16(uint32(bits + uint32(0x7fff) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16))


@numba.njit(inline="always", fastmath={"contract"})
def normal_share(u):
    """The share of a standard normal distribution below u, within 4e-5: gelu(u) is u times it (Hendrycks and Gimpel, 2016)."""
    u = min(max(u, -END), END)
    v = u * u * PER_SQUARE - ONE
    return HALF + u * (P0 + v * (P1 + v * (P2 + v * (P3 + v * (P4 + v * (P5 + v * (P6 + v * (P7 + v * P8))))))))


@numba.njit(inline="always", fastmath={"contract"})
def gelu_slope(u):
    """The derivative of gelu at u, within 6e-4: half of bfloat16's step at 1 is 2e-3."""
    u = min(max(u, -END), END)
    v = u * u * PER_SQUARE - ONE
    return HALF + u * (S0 + v * (S1 + v * (S2 + v * (S3 + v * (S4 + v * (S5 + v * (S6 + v * (S7 + v * S8))))))))


@numba.njit(inline="always", fastmath={"contract"})
def fine(coefficients, u):
    """Half more than the odd polynomial of these coefficients, at u; 0 and 1 where it is saturated, since u may be large."""
    v = u * u * PER_SQUARE_FINE - ONE
    sum_ = coefficients[FINE]
    for k in range(FINE):
        sum_ = coefficients[FINE - 1 - k] + v * sum_
    return ZERO if u <= -END_FINE else ONE if u >= END_FINE else HALF + u * sum_


@numba.njit(inline="always", fastmath={"contract"})
def fine_normal_share(u):
    """As `normal_share`, within 2e-7."""
    return fine(SHARE, u)


@numba.njit(inline="always", fastmath={"contract"})
def fine_gelu_slope(u):
    """As `gelu_slope`, within 2e-6."""
    return fine(SLOPE, u)


# The five below are chosen by the type of `bits`, when numba compiles what calls them, and two of them by that of `below`: None for GELU, a
# number for a ReLU, by which it multiplies what is below 0 (0, or that of a leaky one).

def number(bits):
    """The float32 of these bits."""


def coded(value, bits):
    """A float32's bits, of the same type as `bits`."""


def activated(u, bits, below):
    """The activation of u, as closely as `bits` can tell."""


def back_through(gradient, u, bits, below):
    """The gradient of u: that of the activation times its derivative at u."""


def order(bits):
    """An integer of the same order as the numbers; less what follows it wraps, and NaN of either sign is greatest."""


@overload(number, inline="always")
def number_of(bits):
    return (lambda bits: widen(bits)) if bits == int16 else lambda bits: as_float(uint32(bits))


@overload(coded, inline="always")
def coded_as(value, bits):
    return (lambda value, bits: narrow(value)) if bits == int16 else lambda value, bits: int32(as_bits(value))


@overload(order, inline="always")
def order_of(bits):
    """Of negative numbers all bits but the sign's are turned over, so that they, too, rise with the number."""
    if bits == int16:
        return lambda bits: int16(int16(bits ^ ((bits >> 15) & 0x7fff)) - 127)
    return lambda bits: int32(int32(bits ^ ((bits >> int32(31)) & int32(0x7fffffff))) - int32(0x7fffff))


@overload(activated, inline="always")
def activated_by(u, bits, below):
    """Numba's choice of `activated`."""
    if below != types.none:    # of a ReLU 0 of -infinity and, on the way back, of an infinite gradient; NaN of NaN
        return lambda u, bits, below: (float32(below) * u if below != 0 else ZERO) if u <= ZERO else u
    return (lambda u, bits, below: u * normal_share(u)) if bits == int16 else lambda u, bits, below: u * fine_normal_share(u)


@overload(back_through, inline="always")
def back_through_by(gradient, u, bits, below):
    """Numba's choice of `back_through`."""
    if below != types.none:
        return lambda gradient, u, bits, below: (float32(below) * gradient if below != 0 else ZERO) if u <= ZERO else gradient
    return (lambda gradient, u, bits, below: gradient * gelu_slope(u)) if bits == int16 else lambda gradient, u, bits, below: gradient * fine_gelu_slope(u)


@numba.njit(inline="always", fastmath={"contract"})
def before_activation(value, a, d, scale, shortcut):
    """What the activation is taken of, of one value of x and the bits of its shortcut."""
    added = scale * number(shortcut)
    return a * value + d + (added if scale != ZERO else ZERO)    # nothing of an infinity


def pool(x, pooled, taken):
    """The greatest of each 2x2 pixels of x (B, H, W, C) into pooled (B, H // 2, W // 2, C), and which of the four into taken."""
    count, tall, wide, channels = pooled.shape
    for image in numba.prange(count):
        for i in range(tall):
            for j in range(wide):
                for c in range(channels):
                    best = x[image, 2 * i, 2 * j, c]
                    highest, place = order(best), uint8(0)
                    for k in range(1, 4):
                        bits = x[image, 2 * i + k // 2, 2 * j + k % 2, c]
                        if order(bits) > highest:
                            best, highest, place = bits, order(bits), uint8(k)
                    pooled[image, i, j, c], taken[image, i, j, c] = best, place


def unpool(gradient, taken, spread):
    """The gradient of `pool` by x, into spread."""
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


# The four passes of normalisation work on activation(a * x + d + scale * shortcut): a and d, (1, C) or (B, C), hold the
# normalisation and, where there is one, the gate of each image. Without a shortcut, x stands for it, and scale is 0. below says which
# activation it is.

def sums(x, pivot, total, squares):
    """Sums of x - pivot and of its square, float32 (R, C): one row for each B / R images in turn."""
    rows, channels = total.shape
    count, pixels = x.shape[0], x.shape[1]
    for row in numba.prange(rows):
        for c in range(channels):
            total[row, c] = squares[row, c] = 0
        for image in range(row * count // rows, (row + 1) * count // rows):
            for p in range(pixels):
                for c in range(channels):
                    value = number(x[image, p, c]) - pivot[c]
                    total[row, c] += value
                    squares[row, c] += value * value


def activate(x, shortcut, a, d, scale, below, y):
    """activation(a * x + d + scale * shortcut) into y."""
    count, pixels, channels = x.shape
    factor = float32(scale)
    for image in numba.prange(count):
        row = image % len(a)
        for p in range(pixels):
            for c in range(channels):
                u = before_activation(number(x[image, p, c]), a[row, c], d[row, c], factor, shortcut[image, p, c])
                y[image, p, c] = coded(activated(u, x[image, p, c], below), x[image, p, c])


def gradient_sums(gradient, x, shortcut, a, d, scale, below, mean, total, product):
    """Of what comes back through the activation: sums, and those of its product with x - mean; rows as in `sums`."""
    rows, channels = total.shape
    count, pixels = x.shape[0], x.shape[1]
    factor = float32(scale)
    for row in numba.prange(rows):
        for c in range(channels):
            total[row, c] = product[row, c] = 0
        for image in range(row * count // rows, (row + 1) * count // rows):
            own = image % len(a)
            for p in range(pixels):
                for c in range(channels):
                    value = number(x[image, p, c])
                    u = before_activation(value, a[own, c], d[own, c], factor, shortcut[image, p, c])
                    back = back_through(number(gradient[image, p, c]), u, x[image, p, c], below)
                    total[row, c] += back
                    product[row, c] += back * (value - mean[c])


def gradients(gradient, x, shortcut, a, d, scale, below, of_value, constant, by_back, of_x, of_shortcut):
    """Of what comes back through the activation: by_back * it + of_value * x + constant into of_x, scale * it into of_shortcut."""
    count, pixels, channels = x.shape
    factor = float32(scale)
    for image in numba.prange(count):
        row = image % len(a)
        for p in range(pixels):
            for c in range(channels):
                value = number(x[image, p, c])
                u = before_activation(value, a[row, c], d[row, c], factor, shortcut[image, p, c])
                back = back_through(number(gradient[image, p, c]), u, x[image, p, c], below)
                of_x[image, p, c] = coded(by_back[row, c] * back + of_value[c] * value + constant[row, c], x[image, p, c])
                if factor != 0:
                    of_shortcut[image, p, c] = coded(factor * back, x[image, p, c])


# Tiles of convolutions (seresnet/winograd.py). The matrices B^T, A^T and their transposes are applied to columns and then to rows of a
# patch, LANES channels at once: a number known beforehand, and copies of their own, are what lets LLVM make vector instructions.

LANES = 64
TWO, THREE, FOUR = np.float32(2), np.float32(3), np.float32(4)


@numba.njit(inline="always", fastmath={"contract"})
def patch(a, b, c, d, e):
    """B^T: five pixels of the input, transformed."""
    return TWO * (a - c) + d - b, d - c - TWO * b, TWO * b - THREE * c + d, d - b, TWO * (b - d) + e - c


@numba.njit(inline="always", fastmath={"contract"})
def patch_back(a, b, c, d, e):
    """B: the adjoint of `patch`."""
    return TWO * a, TWO * (c + e - b) - a - d, -TWO * a - b - THREE * c - e, a + b + c + d - TWO * e, e


@numba.njit(inline="always", fastmath={"contract"})
def output(a, b, c, d, e):
    """A^T: three pixels of the output."""
    return a + b + c + d, b - c + TWO * d, b + c + FOUR * d + e


@numba.njit(inline="always", fastmath={"contract"})
def output_back(a, b, c):
    """A: the adjoint of `output`."""
    return a, a + b + c, a - b + c, a + TWO * b + FOUR * c, c


def patches(x, padding, down, across, seen):
    """B^T d B of the patches of x (B, H, W, C) under down x across tiles an image, into seen (25, B * down * across, C).

    The first pixel of the first patch lies `padding` pixels above and left of the image; outside are zeros.
    """
    count, height, width, channels = x.shape
    pixels, places, plane = x.reshape(-1), seen.reshape(-1), seen.shape[1] * channels
    for row in numba.prange(count * down):
        image, i = row // down, row % down
        d, t = np.empty((5, 5, LANES), np.float32), np.empty((5, 5, LANES), np.float32)
        for j in range(across):
            for first in range(0, channels, LANES):
                some = uintp(min(LANES, channels - first))
                for k in range(25):
                    high, wide = 3 * i - padding + k // 5, 3 * j - padding + k % 5
                    if 0 <= high < height and 0 <= wide < width:
                        start = uintp(((image * height + high) * width + wide) * channels + first)
                        for c in range(some):
                            d[k // 5, k % 5, c] = pixels[start + c]
                    else:
                        d[k // 5, k % 5] = 0
                for k in range(5):
                    for c in range(LANES):
                        t[0, k, c], t[1, k, c], t[2, k, c], t[3, k, c], t[4, k, c] = patch(
                            d[0, k, c], d[1, k, c], d[2, k, c], d[3, k, c], d[4, k, c])
                for k in range(5):
                    for c in range(LANES):
                        d[k, 0, c], d[k, 1, c], d[k, 2, c], d[k, 3, c], d[k, 4, c] = patch(
                            t[k, 0, c], t[k, 1, c], t[k, 2, c], t[k, 3, c], t[k, 4, c])
                for k in range(25):
                    start = uintp(k * plane + (row * across + j) * channels + first)
                    for c in range(some):
                        places[start + c] = d[k // 5, k % 5, c]


def patches_back(seen, padding, down, across, x):
    """The adjoint of `patches`: sums into x, all of it written."""
    count, height, width, channels = x.shape
    pixels, places, plane = x.reshape(-1), seen.reshape(-1), seen.shape[1] * channels
    for image in numba.prange(count):
        d, t = np.empty((5, 5, LANES), np.float32), np.empty((5, 5, LANES), np.float32)
        x[image] = 0
        for tile in range(down * across):
            i, j = tile // across, tile % across
            for first in range(0, channels, LANES):
                some = uintp(min(LANES, channels - first))
                for k in range(25):
                    start = uintp(k * plane + (image * down * across + tile) * channels + first)
                    for c in range(some):
                        d[k // 5, k % 5, c] = places[start + c]
                for k in range(5):
                    for c in range(LANES):
                        t[0, k, c], t[1, k, c], t[2, k, c], t[3, k, c], t[4, k, c] = patch_back(
                            d[0, k, c], d[1, k, c], d[2, k, c], d[3, k, c], d[4, k, c])
                for k in range(5):
                    for c in range(LANES):
                        d[k, 0, c], d[k, 1, c], d[k, 2, c], d[k, 3, c], d[k, 4, c] = patch_back(
                            t[k, 0, c], t[k, 1, c], t[k, 2, c], t[k, 3, c], t[k, 4, c])
                for k in range(25):
                    high, wide = 3 * i - padding + k // 5, 3 * j - padding + k % 5
                    if 0 <= high < height and 0 <= wide < width:
                        start = uintp(((image * height + high) * width + wide) * channels + first)
                        for c in range(some):
                            pixels[start + c] += d[k // 5, k % 5, c]


def outputs(made, y):
    """A^T m A of each tile of made (25, B * tiles, C), into y (B, H, W, C); what lies outside of y is dropped."""
    count, height, width, channels = y.shape
    down, across = (height + 2) // 3, (width + 2) // 3
    pixels, places, plane = y.reshape(-1), made.reshape(-1), made.shape[1] * channels
    for row in numba.prange(count * down):
        image, i = row // down, row % down
        d, t = np.empty((5, 5, LANES), np.float32), np.empty((3, 5, LANES), np.float32)
        for j in range(across):
            for first in range(0, channels, LANES):
                some = uintp(min(LANES, channels - first))
                for k in range(25):
                    start = uintp(k * plane + (row * across + j) * channels + first)
                    for c in range(some):
                        d[k // 5, k % 5, c] = places[start + c]
                for k in range(5):
                    for c in range(LANES):
                        t[0, k, c], t[1, k, c], t[2, k, c] = output(d[0, k, c], d[1, k, c], d[2, k, c], d[3, k, c], d[4, k, c])
                for k in range(3):
                    for c in range(LANES):
                        d[k, 0, c], d[k, 1, c], d[k, 2, c] = output(t[k, 0, c], t[k, 1, c], t[k, 2, c], t[k, 3, c], t[k, 4, c])
                for k in range(9):
                    high, wide = 3 * i + k // 3, 3 * j + k % 3
                    if high < height and wide < width:
                        start = uintp(((image * height + high) * width + wide) * channels + first)
                        for c in range(some):
                            pixels[start + c] = d[k // 3, k % 3, c]


def outputs_back(gradient, made):
    """The adjoint of `outputs`, of gradient (B, H, W, C), into made (25, B * tiles, C)."""
    count, height, width, channels = gradient.shape
    down, across = (height + 2) // 3, (width + 2) // 3
    pixels, places, plane = gradient.reshape(-1), made.reshape(-1), made.shape[1] * channels
    for row in numba.prange(count * down):
        image, i = row // down, row % down
        d, t = np.empty((5, 5, LANES), np.float32), np.empty((5, 3, LANES), np.float32)
        for j in range(across):
            for first in range(0, channels, LANES):
                some = uintp(min(LANES, channels - first))
                for k in range(9):
                    high, wide = 3 * i + k // 3, 3 * j + k % 3
                    if high < height and wide < width:
                        start = uintp(((image * height + high) * width + wide) * channels + first)
                        for c in range(some):
                            d[k // 3, k % 3, c] = pixels[start + c]
                    else:
                        d[k // 3, k % 3] = 0
                for k in range(3):
                    for c in range(LANES):
                        t[0, k, c], t[1, k, c], t[2, k, c], t[3, k, c], t[4, k, c] = output_back(d[0, k, c], d[1, k, c], d[2, k, c])
                for k in range(5):
                    for c in range(LANES):
                        d[k, 0, c], d[k, 1, c], d[k, 2, c], d[k, 3, c], d[k, 4, c] = output_back(t[k, 0, c], t[k, 1, c], t[k, 2, c])
                for k in range(25):
                    start = uintp(k * plane + (row * across + j) * channels + first)
                    for c in range(some):
                        places[start + c] = d[k // 5, k % 5, c]
