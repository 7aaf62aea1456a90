"""3x3 convolutions in float32 on a CPU with 25 multiplications where the sum as it is written has 81: Winograd's minimal filtering."""
from __future__ import annotations

import torch
from torch.amp import custom_bwd, custom_fwd
from torch.autograd.function import once_differentiable

from seresnet.compiled import may_read, passes

TILE = 3           # pixels of the output, a side, that are computed together,
PATCH = 5          # from so many of the input
LEAST_CHANNELS = 48    # in and out, and so many of their product: then the products outweigh what is written and read around them
LEAST_TRAINED, LEAST_FORWARDS = 64 * 64, 64 * 128
TOGETHER = 256     # tiles at once: what they become stays in a cache of some MB

# F(3x3, 3x3) with the points 0, 1, -1, 2 and infinity: with PATCHES (B^T) and OUTPUTS (A^T) of seresnet/kernels.py, a row of
# five input pixels d and a filter f of three give A^T [(G f) * (B^T d)], the three sums of d shifted and f.
FILTERS = torch.tensor([[1 / 2, 0, 0], [-1 / 2, -1 / 2, -1 / 2], [-1 / 6, 1 / 6, -1 / 6], [1 / 6, 1 / 3, 2 / 3], [0, 0, 1]])    # G


def pays(x: torch.Tensor, weight: torch.Tensor, stride: int) -> bool:
    """Whether torch's convolution of x (B, C_in, H, W), channels-last, and weight (C_out, C_in, k, k) takes longer: measured by
    benchmarks/convolutions.py --precision fp32. Forwards alone, where no gradient is wanted, more channels are needed than both ways."""
    trains = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    least = LEAST_TRAINED if trains else LEAST_FORWARDS
    return (not x.is_cuda and may_read(x)    # first of all: for traces
            and x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
            and x.shape[1] == weight.shape[1] and weight.shape[2:] == (3, 3) and stride == 1 and min(weight.shape[:2]) >= LEAST_CHANNELS
            and weight.shape[:2].numel() >= least)


class Winograd(torch.autograd.Function):
    """The cross-correlation of x (B, C_in, H, W), float32, and weight (C_out, C_in, 3, 3): (B, C_out, height, width), channels-last.

    Pixel (i, j) of the output is the sum over the 3x3 pixels of x from (i - padding, j - padding) on, zeros outside. Tiles of 3x3
    output pixels are taken apart, and in the transformed space the convolution is one product of matrices for each of 25 places
    (Winograd, "Arithmetic Complexity of Computations", 1980; Lavin and Gray, arXiv 1509.09308, section 4.1). The backward pass is
    the exact adjoint of each step; it is not differentiated itself. Errors are of the size that float32's own rounding makes in the
    plain sum (1e-6 of the whole).
    """

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, padding: int, height: int, width: int) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding, run = padding, passes()
        images, filters = _rows(x), _transformed(weight)
        y = x.new_empty(len(x), height, width, len(weight))
        for part, seen, made in _parts(len(x), height, width, *weight.shape[:2]):
            run.patches(images[part], padding, *_grid(height, width), seen.numpy())
            torch.bmm(seen, filters, out=made)
            run.outputs(made.numpy(), y[part].numpy())
        return y.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")    # the caller may have autocast on for the backward pass alone
    def backward(ctx, gradient: torch.Tensor):
        (x, weight), run = ctx.saved_tensors, passes()
        of_x, of_weight = ctx.needs_input_grad[:2]
        images, back, filters = _rows(x), _rows(gradient), _transformed(weight).transpose(1, 2).contiguous()
        height, width = gradient.shape[2:]
        spread = x.new_empty(len(x), *x.shape[2:], x.shape[1]) if of_x else None
        of_filters = x.new_zeros(PATCH**2, x.shape[1], len(weight))
        for part, seen, made in _parts(len(x), height, width, *weight.shape[:2]):
            run.outputs_back(back[part], made.numpy())
            if of_weight:
                run.patches(images[part], ctx.padding, *_grid(height, width), seen.numpy())
                of_filters.baddbmm_(seen.transpose(1, 2), made)
            if of_x:
                torch.bmm(made, filters, out=seen)
                run.patches_back(seen.numpy(), ctx.padding, *_grid(height, width), spread[part].numpy())
        return (spread.permute(0, 3, 1, 2) if of_x else None, _transformed_back(of_filters, weight) if of_weight else None, None, None, None)


def _grid(height: int, width: int) -> tuple[int, int]:
    """Tiles down and across that cover an output of height x width pixels."""
    return -(-height // TILE), -(-width // TILE)


def _parts(images: int, height: int, width: int, c_out: int, c_in: int):
    """For some images at once: which, and memory for their patches (25, tiles, c_in) and outputs (25, tiles, c_out), transformed."""
    down, across = _grid(height, width)
    most = max(1, TOGETHER // (down * across))
    most = -(-images // -(-images // most)) if images else 1    # parts of nearly one size
    places = PATCH**2 * most * down * across
    memory = torch.empty(places * c_in, dtype=torch.float32), torch.empty(places * c_out, dtype=torch.float32)
    for first in range(0, images, most):
        count = min(most, images - first)
        yield slice(first, first + count), *(
            m[:PATCH**2 * count * down * across * c].view(PATCH**2, count * down * across, c) for m, c in zip(memory, (c_in, c_out)))


def _rows(images: torch.Tensor):
    """(B, C, H, W) as a float32 array (B, H, W, C): the same memory where that is channels-last, a copy elsewhere."""
    return images.detach().permute(0, 2, 3, 1).contiguous().numpy()


def _places(weight: torch.Tensor) -> torch.Tensor:
    """The transformation of a filter's nine pixels into 25 places: (25, 9)."""
    filters = FILTERS.to(weight.dtype)
    return torch.kron(filters, filters)


def _transformed(weight: torch.Tensor) -> torch.Tensor:
    """(C_out, C_in, 3, 3) -> (25, C_in, C_out): G f G^T."""
    c_out, c_in = weight.shape[:2]
    return (_places(weight) @ weight.detach().permute(2, 3, 1, 0).reshape(9, -1)).view(PATCH**2, c_in, c_out)


def _transformed_back(of_filters: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The adjoint of `_transformed`: (25, C_in, C_out) -> (C_out, C_in, 3, 3)."""
    c_out, c_in = weight.shape[:2]
    return (_places(weight).T @ of_filters.view(PATCH**2, -1)).view(3, 3, c_in, c_out).permute(3, 2, 0, 1)
