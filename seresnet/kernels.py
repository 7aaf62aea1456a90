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


# Tiles of convolutions (seresnet/winograd.py): 3, 4 or 6 pixels of the output a side, from a patch of two more of the input. The matrices
# B^T, A^T and their transposes are applied to columns and then to rows of a patch, LANES channels at once, in copies of their own, where
# channel k of row r and column c lies at (8 * r + c) * LANES + k: numbers known beforehand, counted without a sign, are what lets LLVM make
# vector instructions. Functions of their own, compiled once, for both directions: inlined, they took twice as long to compile.

LANES = 32
EACH = uintp(LANES)
RIGHT, DOWN = tuple(uintp(LANES * k) for k in range(8)), tuple(uintp(8 * LANES * k) for k in range(8))
TWO, THREE, FOUR, FIVE, EIGHT = np.float32(2), np.float32(3), np.float32(4), np.float32(5), np.float32(8)
LOW, HIGH = np.float32(2 / 3), np.float32(3 / 2)    # the points of tiles of four pixels, beside 0 and with either sign; their powers, and
LOW2, LOW3, HIGH2, HIGH3, BOTH2 = np.float32(4 / 9), np.float32(8 / 27), np.float32(9 / 4), np.float32(27 / 8), np.float32(97 / 36)    # a sum
FOURTH, EIGHTH, SIXTEENTH, THIRTY_SECOND = np.float32(1 / 4), np.float32(1 / 8), np.float32(1 / 16), np.float32(1 / 32)    # of tiles of six
SIXTEEN, THIRTY_TWO = np.float32(16), np.float32(32)    # pixels: powers of the points 2 and 1 / 2,
F5_4, F5_2, F17_4, F21_4 = np.float32(5 / 4), np.float32(5 / 2), np.float32(17 / 4), np.float32(21 / 4)    # and what products of all points give


@numba.njit(inline="always", fastmath={"contract"})
def patch3(a, b, c, d, e):
    """B^T: five pixels of the input, transformed."""
    return TWO * (a - c) + d - b, d - c - TWO * b, TWO * b - THREE * c + d, d - b, TWO * (b - d) + e - c


@numba.njit(inline="always", fastmath={"contract"})
def patch3_back(a, b, c, d, e):
    """B: the adjoint of `patch3`."""
    return TWO * a, TWO * (c + e - b) - a - d, -TWO * a - b - THREE * c - e, a + b + c + d - TWO * e, e


@numba.njit(inline="always", fastmath={"contract"})
def output3(a, b, c, d, e):
    """A^T: three pixels of the output."""
    return a + b + c + d, b - c + TWO * d, b + c + FOUR * d + e


@numba.njit(inline="always", fastmath={"contract"})
def output3_back(a, b, c):
    """A: the adjoint of `output3`."""
    return a, a + b + c, a - b + c, a + TWO * b + FOUR * c, c


@numba.njit(inline="always", fastmath={"contract"})
def patch4(a, b, c, d, e, f):
    """B^T: six pixels of the input, transformed. What two points of opposite sign share is computed once."""
    even, odd, even2, odd2 = e - HIGH2 * c, LOW * d - HIGH * b, e - LOW2 * c, HIGH * d - LOW * b
    return a - BOTH2 * c + e, even + odd, even - odd, even2 + odd2, even2 - odd2, b - BOTH2 * d + f


@numba.njit(inline="always", fastmath={"contract"})
def patch4_back(a, b, c, d, e, f):
    """B: the adjoint of `patch4`."""
    even, odd, even2, odd2 = b + c, b - c, d + e, d - e
    return a, f - HIGH * odd - LOW * odd2, -BOTH2 * a - HIGH2 * even - LOW2 * even2, LOW * odd + HIGH * odd2 - BOTH2 * f, a + even + even2, f


@numba.njit(inline="always", fastmath={"contract"})
def output4(a, b, c, d, e, f):
    """A^T: four pixels of the output."""
    even, odd, even2, odd2 = b + c, b - c, d + e, d - e
    return a + even + even2, LOW * odd + HIGH * odd2, LOW2 * even + HIGH2 * even2, LOW3 * odd + HIGH3 * odd2 + f


@numba.njit(inline="always", fastmath={"contract"})
def output4_back(a, b, c, d):
    """A: the adjoint of `output4`."""
    even, odd, even2, odd2 = a + LOW2 * c, LOW * b + LOW3 * d, a + HIGH2 * c, HIGH * b + HIGH3 * d
    return a, even + odd, even - odd, even2 + odd2, even2 - odd2, d


@numba.njit(inline="always", fastmath={"contract"})
def patch6(a, b, c, d, e, f, g, h):
    """B^T: eight pixels of the input, transformed."""
    even, odd = g - F17_4 * e + c, f - F17_4 * d + b
    even2, odd2 = g - F5_4 * e + FOURTH * c, TWO * f - F5_2 * d + HALF * b
    even3, odd3 = g - FIVE * e + FOUR * c, HALF * f - F5_2 * d + TWO * b
    return (g - a + F21_4 * (c - e), even + odd, even - odd, even2 + odd2, even2 - odd2, even3 + odd3, even3 - odd3,
            h - b + F21_4 * (d - f))


@numba.njit(inline="always", fastmath={"contract"})
def patch6_back(a, b, c, d, e, f, g, h):
    """B: the adjoint of `patch6`."""
    even, odd, even2, odd2, even3, odd3 = b + c, b - c, d + e, d - e, f + g, f - g
    return (-a, odd + HALF * odd2 + TWO * odd3 - h, F21_4 * a + even + FOURTH * even2 + FOUR * even3,
            F21_4 * h - F17_4 * odd - F5_2 * (odd2 + odd3), -F21_4 * a - F17_4 * even - F5_4 * even2 - FIVE * even3,
            odd + TWO * odd2 + HALF * odd3 - F21_4 * h, a + even + even2 + even3, h)


@numba.njit(inline="always", fastmath={"contract"})
def output6(a, b, c, d, e, f, g, h):
    """A^T: six pixels of the output."""
    even, odd, even2, odd2, even3, odd3 = b + c, b - c, d + e, d - e, f + g, f - g
    return (a + even + even2 + even3, odd + TWO * odd2 + HALF * odd3, even + FOUR * even2 + FOURTH * even3,
            odd + EIGHT * odd2 + EIGHTH * odd3, even + SIXTEEN * even2 + SIXTEENTH * even3, odd + THIRTY_TWO * odd2 + THIRTY_SECOND * odd3 + h)


@numba.njit(inline="always", fastmath={"contract"})
def output6_back(a, b, c, d, e, f):
    """A: the adjoint of `output6`."""
    even, odd = a + c + e, b + d + f
    even2, odd2 = a + FOUR * c + SIXTEEN * e, TWO * b + EIGHT * d + THIRTY_TWO * f
    even3, odd3 = a + FOURTH * c + SIXTEENTH * e, HALF * b + EIGHTH * d + THIRTY_SECOND * f
    return a, even + odd, even - odd, even2 + odd2, even2 - odd2, even3 + odd3, even3 - odd3, f


@numba.njit(fastmath={"contract"})
def to_patch(tile, columns, d, t):
    """The transpose of B^T d into t, of `columns` columns of d."""
    for column in range(columns):
        u, v = uintp(8 * LANES * column), uintp(LANES * column)
        if tile == 3:
            for c in range(EACH):
                t[u + c], t[u + RIGHT[1] + c], t[u + RIGHT[2] + c], t[u + RIGHT[3] + c], t[u + RIGHT[4] + c] = patch3(
                    d[v + c], d[v + DOWN[1] + c], d[v + DOWN[2] + c], d[v + DOWN[3] + c], d[v + DOWN[4] + c])
        elif tile == 4:
            for c in range(EACH):
                t[u + c], t[u + RIGHT[1] + c], t[u + RIGHT[2] + c], t[u + RIGHT[3] + c], t[u + RIGHT[4] + c], t[u + RIGHT[5] + c] = patch4(
                    d[v + c], d[v + DOWN[1] + c], d[v + DOWN[2] + c], d[v + DOWN[3] + c], d[v + DOWN[4] + c], d[v + DOWN[5] + c])
        else:
            for c in range(EACH):
                (t[u + c], t[u + RIGHT[1] + c], t[u + RIGHT[2] + c], t[u + RIGHT[3] + c], t[u + RIGHT[4] + c], t[u + RIGHT[5] + c],
                 t[u + RIGHT[6] + c], t[u + RIGHT[7] + c]) = patch6(
                    d[v + c], d[v + DOWN[1] + c], d[v + DOWN[2] + c], d[v + DOWN[3] + c], d[v + DOWN[4] + c], d[v + DOWN[5] + c],
                    d[v + DOWN[6] + c], d[v + DOWN[7] + c])


@numba.njit(fastmath={"contract"})
def from_patch(tile, columns, d, t):
    """The transpose of B d into t: the adjoint of `to_patch`."""
    for column in range(columns):
        u, v = uintp(8 * LANES * column), uintp(LANES * column)
        if tile == 3:
            for c in range(EACH):
                t[u + c], t[u + RIGHT[1] + c], t[u + RIGHT[2] + c], t[u + RIGHT[3] + c], t[u + RIGHT[4] + c] = patch3_back(
                    d[v + c], d[v + DOWN[1] + c], d[v + DOWN[2] + c], d[v + DOWN[3] + c], d[v + DOWN[4] + c])
        elif tile == 4:
            for c in range(EACH):
                t[u + c], t[u + RIGHT[1] + c], t[u + RIGHT[2] + c], t[u + RIGHT[3] + c], t[u + RIGHT[4] + c], t[u + RIGHT[5] + c] = patch4_back(
                    d[v + c], d[v + DOWN[1] + c], d[v + DOWN[2] + c], d[v + DOWN[3] + c], d[v + DOWN[4] + c], d[v + DOWN[5] + c])
        else:
            for c in range(EACH):
                (t[u + c], t[u + RIGHT[1] + c], t[u + RIGHT[2] + c], t[u + RIGHT[3] + c], t[u + RIGHT[4] + c], t[u + RIGHT[5] + c],
                 t[u + RIGHT[6] + c], t[u + RIGHT[7] + c]) = patch6_back(
                    d[v + c], d[v + DOWN[1] + c], d[v + DOWN[2] + c], d[v + DOWN[3] + c], d[v + DOWN[4] + c], d[v + DOWN[5] + c],
                    d[v + DOWN[6] + c], d[v + DOWN[7] + c])


@numba.njit(fastmath={"contract"})
def to_output(tile, columns, d, t):
    """The transpose of A^T d into t."""
    for column in range(columns):
        u, v = uintp(8 * LANES * column), uintp(LANES * column)
        if tile == 3:
            for c in range(EACH):
                t[u + c], t[u + RIGHT[1] + c], t[u + RIGHT[2] + c] = output3(
                    d[v + c], d[v + DOWN[1] + c], d[v + DOWN[2] + c], d[v + DOWN[3] + c], d[v + DOWN[4] + c])
        elif tile == 4:
            for c in range(EACH):
                t[u + c], t[u + RIGHT[1] + c], t[u + RIGHT[2] + c], t[u + RIGHT[3] + c] = output4(
                    d[v + c], d[v + DOWN[1] + c], d[v + DOWN[2] + c], d[v + DOWN[3] + c], d[v + DOWN[4] + c], d[v + DOWN[5] + c])
        else:
            for c in range(EACH):
                t[u + c], t[u + RIGHT[1] + c], t[u + RIGHT[2] + c], t[u + RIGHT[3] + c], t[u + RIGHT[4] + c], t[u + RIGHT[5] + c] = output6(
                    d[v + c], d[v + DOWN[1] + c], d[v + DOWN[2] + c], d[v + DOWN[3] + c], d[v + DOWN[4] + c], d[v + DOWN[5] + c],
                    d[v + DOWN[6] + c], d[v + DOWN[7] + c])


@numba.njit(fastmath={"contract"})
def from_output(tile, columns, d, t):
    """The transpose of A d into t: the adjoint of `to_output`."""
    for column in range(columns):
        u, v = uintp(8 * LANES * column), uintp(LANES * column)
        if tile == 3:
            for c in range(EACH):
                t[u + c], t[u + RIGHT[1] + c], t[u + RIGHT[2] + c], t[u + RIGHT[3] + c], t[u + RIGHT[4] + c] = output3_back(
                    d[v + c], d[v + DOWN[1] + c], d[v + DOWN[2] + c])
        elif tile == 4:
            for c in range(EACH):
                t[u + c], t[u + RIGHT[1] + c], t[u + RIGHT[2] + c], t[u + RIGHT[3] + c], t[u + RIGHT[4] + c], t[u + RIGHT[5] + c] = output4_back(
                    d[v + c], d[v + DOWN[1] + c], d[v + DOWN[2] + c], d[v + DOWN[3] + c])
        else:
            for c in range(EACH):
                (t[u + c], t[u + RIGHT[1] + c], t[u + RIGHT[2] + c], t[u + RIGHT[3] + c], t[u + RIGHT[4] + c], t[u + RIGHT[5] + c],
                 t[u + RIGHT[6] + c], t[u + RIGHT[7] + c]) = output6_back(
                    d[v + c], d[v + DOWN[1] + c], d[v + DOWN[2] + c], d[v + DOWN[3] + c], d[v + DOWN[4] + c], d[v + DOWN[5] + c])


@numba.njit(inline="always")
def take(source, start, some, target, at):
    """Copies `some` numbers, LANES at most: that many in vectors, which a number unknown beforehand would leave to a call of memcpy."""
    if some == EACH:
        for c in range(EACH):
            target[at + c] = source[start + c]
    else:
        for c in range(some):
            target[at + c] = source[start + c]


@numba.njit(inline="always")
def to_places(d, rows, columns, some, places, start, plane):
    """The copy's rows x columns places into `places`, each `plane` numbers behind the one before, from `start` on."""
    for r in range(rows):
        for c in range(columns):
            take(d, uintp((8 * r + c) * LANES), some, places, uintp(start + (columns * r + c) * plane))


@numba.njit(inline="always")
def from_places(places, start, plane, rows, columns, some, d):
    """The way back of `to_places`."""
    for r in range(rows):
        for c in range(columns):
            take(places, uintp(start + (columns * r + c) * plane), some, d, uintp((8 * r + c) * LANES))


def patches(x, padding, region, seen):
    """B^T d B of the patches of x (B, H, W, C) under the tiles of a region, into seen (P, B * down * across, C).

    A region of the output is (top, left, down, across, high, wide): its first pixel, and so many tiles of high x wide pixels. A patch has
    P = (high + 2) * (wide + 2) places. Pixel (0, 0) of the output looks from `padding` pixels above and left of x on; outside are zeros.
    """
    count, height, width, channels = x.shape
    top, left, down, across, high, wide = region
    pixels, places, plane = x.reshape(-1), seen.reshape(-1), seen.shape[1] * channels
    for row in numba.prange(count * down):
        image, i = row // down, row % down
        d, t = np.empty(64 * LANES, np.float32), np.empty(64 * LANES, np.float32)
        for j in range(across):
            for first in range(0, channels, LANES):
                some = uintp(min(LANES, channels - first))
                for r in range(high + 2):
                    y = top + high * i - padding + r
                    for c in range(wide + 2):
                        beside, at = left + wide * j - padding + c, uintp((8 * r + c) * LANES)
                        if 0 <= y < height and 0 <= beside < width:
                            take(pixels, uintp(((image * height + y) * width + beside) * channels + first), some, d, at)
                        else:
                            for k in range(EACH):
                                d[at + k] = 0
                to_patch(high, wide + 2, d, t)
                to_patch(wide, high + 2, t, d)
                to_places(d, high + 2, wide + 2, some, places, (row * across + j) * channels + first, plane)


def patches_back(seen, padding, region, x):
    """The adjoint of `patches`: adds to x."""
    count, height, width, channels = x.shape
    top, left, down, across, high, wide = region
    pixels, places, plane = x.reshape(-1), seen.reshape(-1), seen.shape[1] * channels
    for image in numba.prange(count):
        d, t = np.empty(64 * LANES, np.float32), np.empty(64 * LANES, np.float32)
        for tile in range(down * across):
            i, j = tile // across, tile % across
            for first in range(0, channels, LANES):
                some = uintp(min(LANES, channels - first))
                from_places(places, (image * down * across + tile) * channels + first, plane, high + 2, wide + 2, some, d)
                from_patch(high, wide + 2, d, t)
                from_patch(wide, high + 2, t, d)
                for r in range(high + 2):
                    y = top + high * i - padding + r
                    for c in range(wide + 2):
                        beside, at = left + wide * j - padding + c, uintp((8 * r + c) * LANES)
                        if 0 <= y < height and 0 <= beside < width:
                            to = uintp(((image * height + y) * width + beside) * channels + first)
                            for k in range(some):
                                pixels[to + k] += d[at + k]


def outputs(made, region, y):
    """A^T m A of each tile of made (P, B * down * across, C), into a region of y (B, H, W, C); what lies outside of y is dropped."""
    count, height, width, channels = y.shape
    top, left, down, across, high, wide = region
    pixels, places, plane = y.reshape(-1), made.reshape(-1), made.shape[1] * channels
    for row in numba.prange(count * down):
        image, i = row // down, row % down
        d, t = np.empty(64 * LANES, np.float32), np.empty(64 * LANES, np.float32)
        for j in range(across):
            for first in range(0, channels, LANES):
                some = uintp(min(LANES, channels - first))
                from_places(places, (row * across + j) * channels + first, plane, high + 2, wide + 2, some, d)
                to_output(high, wide + 2, d, t)
                to_output(wide, high, t, d)
                for r in range(min(high, height - top - high * i)):
                    for c in range(min(wide, width - left - wide * j)):
                        pixel = (image * height + top + high * i + r) * width + left + wide * j + c
                        take(d, uintp((8 * r + c) * LANES), some, pixels, uintp(pixel * channels + first))


def outputs_back(gradient, region, made):
    """The adjoint of `outputs`, of gradient (B, H, W, C), into made (P, B * down * across, C)."""
    count, height, width, channels = gradient.shape
    top, left, down, across, high, wide = region
    pixels, places, plane = gradient.reshape(-1), made.reshape(-1), made.shape[1] * channels
    for row in numba.prange(count * down):
        image, i = row // down, row % down
        d, t = np.empty(64 * LANES, np.float32), np.empty(64 * LANES, np.float32)
        for j in range(across):
            for first in range(0, channels, LANES):
                some = uintp(min(LANES, channels - first))
                for r in range(high):
                    y = top + high * i + r
                    for c in range(wide):
                        beside, at = left + wide * j + c, uintp((8 * r + c) * LANES)
                        if y < height and beside < width:
                            take(pixels, uintp(((image * height + y) * width + beside) * channels + first), some, d, at)
                        else:
                            for k in range(EACH):
                                d[at + k] = 0
                from_output(high, wide, d, t)
                from_output(wide, high + 2, t, d)
                to_places(d, high + 2, wide + 2, some, places, (row * across + j) * channels + first, plane)
