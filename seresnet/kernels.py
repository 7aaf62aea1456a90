"""Passes over bfloat16 images in memory, for numba to compile: max-pooling, and batch normalisation with what follows it.

bfloat16 comes as an int16 array of its bits, which numba knows: the upper half of a float32's. Images are (B, H, W, C) or, with
pixels in a row, (B, P, C); all arrays are contiguous. Loops over channels are innermost, so that they become vector instructions.
"""
from __future__ import annotations

import math

import numba
import numpy as np
from llvmlite import ir
from numba import float32, int16, types, uint8, uint32
from numba.extending import intrinsic

SATURATED = 4.0    # from here on the normal distribution is taken as constant: 3e-5 from 1
HALF, ONE, END, PER_SQUARE = np.float32(0.5), np.float32(1), np.float32(SATURATED), np.float32(2 / SATURATED**2)


def odd_polynomial(function) -> list[np.float32]:
    """Coefficients c of the polynomial of eighth degree for which u * c(2 u^2 / SATURATED^2 - 1) is `function` (odd) up to
    SATURATED: least squares in Chebyshev's points."""
    v = np.cos((np.arange(400) + 0.5) * np.pi / 400)
    u = np.sqrt((v + 1) / 2) * SATURATED
    values = np.array([function(one) for one in u])
    return [np.float32(c) for c in np.polynomial.Polynomial.fit(v, values / u, 8, w=u, domain=[-1, 1]).coef]


P0, P1, P2, P3, P4, P5, P6, P7, P8 = odd_polynomial(lambda u: math.erf(u / math.sqrt(2)) / 2)
S0, S1, S2, S3, S4, S5, S6, S7, S8 = odd_polynomial(
    lambda u: math.erf(u / math.sqrt(2)) / 2 + u * math.exp(-u * u / 2) / math.sqrt(2 * math.pi))


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
def before_gelu(value, a, d, share, shortcut):
    """What GELU is taken of, of one value of x and the bits of its shortcut."""
    return a * value + d + share * widen(shortcut)


def pool(x, pooled, taken):
    """The greatest of each 2x2 pixels of x (B, H, W, C) into pooled (B, H // 2, W // 2, C), and which of the four into taken."""
    count, tall, wide, channels = pooled.shape
    for image in numba.prange(count):
        for i in range(tall):
            for j in range(wide):
                for c in range(channels):
                    best, highest, place = int16(0), int16(-32768), uint8(0)
                    for k in range(4):
                        bits = x[image, 2 * i + k // 2, 2 * j + k % 2, c]
                        # of the same order as the numbers, as an integer; less 127 it wraps, and NaN of either sign is greatest
                        order = int16(int16(bits ^ ((bits >> 15) & 0x7fff)) - 127)
                        if k == 0 or order > highest:
                            best, highest, place = bits, order, uint8(k)
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
# normalisation and, where there is one, the gate of each image. Without a shortcut, x stands for it, and scale is 0.

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
                    value = widen(x[image, p, c]) - pivot[c]
                    total[row, c] += value
                    squares[row, c] += value * value


def activate(x, shortcut, a, d, scale, y):
    """gelu(a * x + d + scale * shortcut) into y."""
    count, pixels, channels = x.shape
    share = float32(scale)
    for image in numba.prange(count):
        row = image % len(a)
        for p in range(pixels):
            for c in range(channels):
                u = before_gelu(widen(x[image, p, c]), a[row, c], d[row, c], share, shortcut[image, p, c])
                y[image, p, c] = narrow(u * normal_share(u))


def gradient_sums(gradient, x, shortcut, a, d, scale, mean, total, product):
    """Of what comes back through the activation: sums, and those of its product with x - mean; rows as in `sums`."""
    rows, channels = total.shape
    count, pixels = x.shape[0], x.shape[1]
    share = float32(scale)
    for row in numba.prange(rows):
        for c in range(channels):
            total[row, c] = product[row, c] = 0
        for image in range(row * count // rows, (row + 1) * count // rows):
            own = image % len(a)
            for p in range(pixels):
                for c in range(channels):
                    value = widen(x[image, p, c])
                    u = before_gelu(value, a[own, c], d[own, c], share, shortcut[image, p, c])
                    back = widen(gradient[image, p, c]) * gelu_slope(u)
                    total[row, c] += back
                    product[row, c] += back * (value - mean[c])


def gradients(gradient, x, shortcut, a, d, scale, of_value, constant, by_back, of_x, of_shortcut):
    """Of what comes back through the activation: by_back * it + of_value * x + constant into of_x, scale * it into of_shortcut."""
    count, pixels, channels = x.shape
    share = float32(scale)
    for image in numba.prange(count):
        row = image % len(a)
        for p in range(pixels):
            for c in range(channels):
                value = widen(x[image, p, c])
                u = before_gelu(value, a[row, c], d[row, c], share, shortcut[image, p, c])
                back = widen(gradient[image, p, c]) * gelu_slope(u)
                of_x[image, p, c] = narrow(by_back[row, c] * back + of_value[c] * value + constant[row, c])
                if share != 0:
                    of_shortcut[image, p, c] = narrow(share * back)
