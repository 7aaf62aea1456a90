"""How much tiles of 3, 4 and 6 pixels round, by their points: python records/2026-11-28_larger_tiles/points.py

Errors of a convolution of normal images, 64 channels to 64, in float32, by root mean square, beside float64. Transformations are made here from
the points alone (Toom and Cook), in exact fractions.
"""
from fractions import Fraction
from itertools import combinations

import torch

CHANNELS, TILES = 64, 150


def transformations(points):
    """A^T, G and B^T of an output of len(points) - 1 pixels: infinity is the last point."""
    size = len(points) + 1
    factors = []
    for p in points:
        factor = Fraction(1)
        for q in points:
            factor *= p - q if p != q else 1
        factors.append(factor)

    def product(roots):
        coefficients = [Fraction(1)]
        for root in roots:
            coefficients = [(coefficients[k - 1] if k else 0) - (root * coefficients[k] if k < len(coefficients) else 0)
                            for k in range(len(coefficients) + 1)]
        return coefficients + [Fraction(0)] * (size - len(coefficients))

    outputs = [[p**k for p in points] + [Fraction(k == size - 3)] for k in range(size - 2)]
    filters = [[p**k / factor for k in range(3)] for p, factor in zip(points, factors)] + [[Fraction(0), Fraction(0), Fraction(1)]]
    patches = [product([q for q in points if q != p]) for p in points] + [product(points)]
    return [torch.tensor([[float(entry) for entry in row] for row in matrix], dtype=torch.float64) for matrix in (outputs, filters, patches)]


def images(size):
    """Patches of size x size pixels, a filter, and their convolution in float64."""
    torch.manual_seed(0)
    x, weight = torch.randn(TILES, size, size, CHANNELS), torch.randn(CHANNELS, CHANNELS, 3, 3) / (3 * CHANNELS**0.5)
    return x, weight, torch.nn.functional.conv2d(x.double().permute(0, 3, 1, 2), weight.double()).permute(0, 2, 3, 1)


def plain_error(size):
    """Of torch's convolution in float32."""
    x, weight, exact = images(size)
    return float((torch.nn.functional.conv2d(x.permute(0, 3, 1, 2), weight).permute(0, 2, 3, 1) - exact).norm() / exact.norm())


def error(points):
    """Of the convolution by way of these points, and infinity."""
    outputs, filters, patches = transformations([Fraction(p) for p in points])
    size = len(patches)
    x, weight, exact = images(size)
    of_filter = torch.einsum("ai,bj,ocij->abco", filters, filters, weight.double()).float().reshape(size * size, CHANNELS, CHANNELS)
    across, made = patches.float(), outputs.float()
    of_image = torch.einsum("bj,najc->abnc", across, torch.einsum("ai,nijc->najc", across, x)).reshape(size * size, TILES, CHANNELS)
    y = torch.bmm(of_image, of_filter).view(size, size, TILES, CHANNELS)
    y = torch.einsum("jb,nibo->nijo", made, torch.einsum("ia,abno->nibo", made, y))
    return float((y - exact).norm() / exact.norm())


def pairs(*points):
    return [0, *(sign * p for p in points for sign in (1, -1))]


def main():
    fractions = sorted({Fraction(a, b) for b in range(1, 6) for a in range(1, 13) if Fraction(1, 4) <= Fraction(a, b) <= 3})
    one, two, half = Fraction(1), Fraction(2), Fraction(1, 2)
    print(f"torch's plain sum, patches of 5 and 8 pixels: {plain_error(5):.2e}, {plain_error(8):.2e}")
    for name, points in (("3 pixels: 0, 1, -1, 2", [0, 1, -1, 2]), ("4 pixels, as often printed: 0, 1, -1, 2, -2", pairs(one, two))):
        print(f"{name}: {error(points):.2e}")
    found = sorted((error(pairs(*chosen)), chosen) for chosen in combinations(fractions, 2))
    print(f"4 pixels, best of {len(found)} pairs: " + "; ".join(f"{', '.join(map(str, chosen))}: {value:.2e}" for value, chosen in found[:5]))
    found = sorted((error(pairs(*chosen)), chosen) for chosen in combinations(fractions, 3)
                   if chosen[0] < Fraction(7, 10) <= chosen[1] <= Fraction(13, 10) < chosen[2])
    print(f"6 pixels, best of {len(found)} triples: " + "; ".join(f"{', '.join(map(str, chosen))}: {value:.2e}" for value, chosen in found[:5]))
    print(f"6 pixels, 1/2, 1, 2: {error(pairs(half, one, two)):.2e}")


if __name__ == "__main__":
    main()
