"""3x3 convolutions in float32 on a CPU with a third to a fifth of the multiplications: Winograd's minimal filtering."""
from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from seresnet.compiled import may_read, passes

LEAST_CHANNELS = 24    # in and out, and so many of their product: then the products outweigh what is written and read around them
LEAST_TRAINED, LEAST_FORWARDS = 32 * 64, 64 * 64
MANY_PIXELS, LEAST_WITH_MANY = 16 * 16, 24 * 64    # in training fewer pay where images are large, most of each in tiles of six pixels
TOGETHER, MOST_TOGETHER = 128, 512    # tiles at once; with more than 85 channels in and out more, since each time all filters are read
COST_OF_A_MATRIX = 48    # multiplications that preparing one of a filter's places costs, and its gradient

# By the tile, pixels of the output a side that are computed together, from two more of the input: the points at which polynomials are
# multiplied, infinity beside them. A tile of 3 takes 25 multiplications for 81, one of 4 36 for 144, one of 6 64 for 324. Points of
# opposite sign share half of their arithmetic; of those tried those of 4 and 6 round least (records/: larger tiles, points.py).
POINTS = {3: (0, 1, -1, 2), 4: (0, 2 / 3, -2 / 3, 3 / 2, -3 / 2), 6: (0, 1, -1, 2, -2, 1 / 2, -1 / 2)}


class Region(NamedTuple):
    """Tiles of one size: down x across of them, each high x wide pixels, from pixel (top, left) of the output on."""
    top: int
    left: int
    down: int
    across: int
    high: int
    wide: int

    @property
    def tiles(self) -> int:
        return self.down * self.across

    @property
    def places(self) -> int:
        return (self.high + 2) * (self.wide + 2)


def pays(x: torch.Tensor, weight: torch.Tensor, stride: int) -> bool:
    """Whether torch's convolution of x (B, C_in, H, W), channels-last, and weight (C_out, C_in, k, k) takes longer: measured by
    benchmarks/convolutions.py --precision fp32. Forwards alone, where no gradient is wanted, more channels are needed than both ways."""
    trains = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return (not x.is_cuda and may_read(x)    # first of all: for traces
            and x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
            and x.shape[1] == weight.shape[1] and weight.shape[2:] == (3, 3) and stride == 1 and min(weight.shape[:2]) >= LEAST_CHANNELS
            and weight.shape[:2].numel() >= (
                LEAST_FORWARDS if not trains else LEAST_TRAINED if x.shape[2:].numel() < MANY_PIXELS else LEAST_WITH_MANY))


class Winograd(torch.autograd.Function):
    """The cross-correlation of x (B, C_in, H, W), float32, and weight (C_out, C_in, 3, 3): (B, C_out, height, width), channels-last.

    Pixel (i, j) of the output is the sum over the 3x3 pixels of x from (i - padding, j - padding) on, zeros outside. Tiles of the
    output are taken apart, and in the transformed space the convolution is one product of matrices for each place of a patch
    (Winograd, "Arithmetic Complexity of Computations", 1980; Lavin and Gray, arXiv 1509.09308, section 4.1). The backward pass is
    the exact adjoint of each step; it is not differentiated itself. Errors are twice those that float32's own rounding makes in the
    plain sum, 0.4e-6 of the whole, and seven times them in tiles of six pixels, 3e-6. Which tiles are taken hangs on the number of
    images, too, so that an image's result differs by as much between batches of different sizes.
    """

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, padding: int, height: int, width: int) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding, run, images = padding, passes(), _rows(x)
        y, tiled = x.new_empty(len(x), height, width, len(weight)), regions(height, width, len(x))
        memory = _memory(tiled, len(x), *weight.shape[:2])
        for region in tiled:
            filters = _transformed(weight, region)
            for part, seen, made in _parts(len(x), region, memory, *weight.shape[:2]):
                run.patches(images[part], padding, region, seen.numpy())
                torch.bmm(seen, filters, out=made)
                run.outputs(made.numpy(), region, y[part].numpy())
            del filters    # before the next are made: with many channels they are large
        return y.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")    # the caller may have autocast on for the backward pass alone
    def backward(ctx, gradient: torch.Tensor):
        (x, weight), run = ctx.saved_tensors, passes()
        of_x, of_weight = ctx.needs_input_grad[:2]
        back, images, tiled = _rows(gradient), _rows(x) if of_weight else None, regions(*gradient.shape[2:], len(x))
        spread = x.new_zeros(len(x), *x.shape[2:], x.shape[1]) if of_x else None
        summed = torch.zeros_like(weight) if of_weight else None
        memory = _memory(tiled, len(x), *weight.shape[:2])
        for region in tiled:
            filters = _transformed(weight.transpose(0, 1), region) if of_x else None
            of_filters = x.new_zeros(region.places, x.shape[1], len(weight)) if of_weight else None
            for part, seen, made in _parts(len(x), region, memory, *weight.shape[:2]):
                run.outputs_back(back[part], region, made.numpy())
                if of_weight:
                    run.patches(images[part], ctx.padding, region, seen.numpy())
                    of_filters.baddbmm_(seen.transpose(1, 2), made)
                if of_x:
                    torch.bmm(made, filters, out=seen)
                    run.patches_back(seen.numpy(), ctx.padding, region, spread[part].numpy())
            if of_weight:
                summed += _transformed_back(of_filters, weight, region)
            del filters, of_filters
        return spread.permute(0, 3, 1, 2) if of_x else None, summed, None, None, None


@cache
def regions(height: int, width: int, images: int) -> tuple[Region, ...]:
    """Tiles that cover an output of height x width pixels, of so many images, with few multiplications."""
    found, top = [], 0
    for high, down in _along(height, images):
        left = 0
        for wide, across in _along(width, images):
            found.append(Region(top, left, down, across, high, wide))
            left += wide * across
        top += high * down
    return tuple(found)


@cache
def _along(side: int, images: int) -> tuple[tuple[int, int], ...]:
    """Tiles that cover `side` pixels, and how many of each: of one size, or large ones and the rest in smaller ones. Of these what costs
    least, in multiplications and in matrices, for a square of that side."""
    mixtures = [[(6, max(0, -(-(side - 4 * fours - 3 * threes) // 6))), (4, fours), (3, threes)] for fours in range(3) for threes in range(2)]
    mixtures += [[(tile, -(-side // tile))] for tile in POINTS]

    def cost(mixture):
        return images * sum((tile + 2) * count for tile, count in mixture)**2 + COST_OF_A_MATRIX * sum(tile + 2 for tile, _ in mixture)**2
    return min((tuple((tile, count) for tile, count in mixture if count) for mixture in mixtures), key=cost)


def _together(images: int, region: Region, c_out: int, c_in: int) -> int:
    """Images that are transformed at once."""
    tiles = min(MOST_TOGETHER, max(TOGETHER, 3 * min(c_in, c_out) // 2))
    most = max(1, tiles // region.tiles)
    return -(-images // -(-images // most)) if images else 1    # parts of nearly one size


def _memory(tiled: Sequence[Region], images: int, c_out: int, c_in: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the largest part of any region needs: for patches and for outputs, transformed."""
    places = max(region.places * region.tiles * _together(images, region, c_out, c_in) for region in tiled)
    return tuple(torch.empty(places * channels, dtype=torch.float32, device="cpu") for channels in (c_in, c_out))


def _parts(images: int, region: Region, memory: tuple[torch.Tensor, torch.Tensor], c_out: int, c_in: int):
    """For some images at once: which, and memory for their patches (P, tiles, c_in) and outputs (P, tiles, c_out), transformed."""
    most = _together(images, region, c_out, c_in)
    for first in range(0, images, most):
        count = min(most, images - first)
        yield slice(first, first + count), *(
            m[:region.places * count * region.tiles * channels].view(region.places, count * region.tiles, channels)
            for m, channels in zip(memory, (c_in, c_out)))


def _rows(images: torch.Tensor):
    """(B, C, H, W) as a float32 array (B, H, W, C): the same memory where that is channels-last, a copy elsewhere."""
    return images.detach().permute(0, 2, 3, 1).contiguous().numpy()


@cache
@torch.inference_mode(False)    # kept for trainings, too, whoever asks first
def filter_matrix(tile: int) -> torch.Tensor:
    """G: (tile + 2, 3), float64. With B^T and A^T of seresnet/kernels.py (patch3, output3 and so on), a row of tile + 2 input pixels d and a
    filter f of three give A^T [(G f) * (B^T d)], the sums of d, shifted, and f."""
    with torch.device("cpu"):
        points = torch.tensor(POINTS[tile], dtype=torch.float64)
        apart = (points[:, None] - points).fill_diagonal_(1).prod(1, keepdim=True)
        return torch.cat([points[:, None] ** torch.arange(3) / apart, torch.tensor([[0.0, 0, 1]])])


@cache
@torch.inference_mode(False)
def _both(high: int, wide: int) -> torch.Tensor:
    """The transformation of a filter's nine pixels into the places of a patch, (P, 9), float32."""
    return torch.kron(filter_matrix(high), filter_matrix(wide)).float()


def _transformed(weight: torch.Tensor, region: Region) -> torch.Tensor:
    """(C_out, C_in, 3, 3) -> (P, C_in, C_out): G f G^T."""
    c_out, c_in = weight.shape[:2]
    return (_both(region.high, region.wide) @ weight.detach().permute(2, 3, 1, 0).reshape(9, -1)).view(-1, c_in, c_out)


def _transformed_back(of_filters: torch.Tensor, weight: torch.Tensor, region: Region) -> torch.Tensor:
    """The adjoint of `_transformed`: (P, C_in, C_out) -> (C_out, C_in, 3, 3)."""
    c_out, c_in = weight.shape[:2]
    return (_both(region.high, region.wide).T @ of_filters.view(len(of_filters), -1)).view(3, 3, c_in, c_out).permute(3, 2, 0, 1)
