"""uint8 batch -> normalised float batch on the device: flip, crop and shift, cutout, blur, jitter, noise; whole-batch, pure
functions.

Images come in as uint8 (B, 3, H, W) with channels-last strides, as the loader yields them, and leave `normalise` as
`dtype` (B, 3, H, W), channels-last. Every random number comes from the torch.Generator handed in (alternating flip:
from a hash of the sample index), so a batch depends on its arguments alone. No function loops over samples.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

PADDINGS = ("reflect", "constant", "zero")
FLIPS = ("none", "random", "alternating")


def train_batch(images: torch.Tensor, indices: torch.Tensor, epoch: int, *, flip: str, translate: int, padding: str,
                cutout: int, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype,
                generator: torch.Generator, seed: int = 0, side: int = 0, brightness: float = 0.0,
                contrast: float = 0.0, blur: float = 0.0, noise: float = 0.0, whole: int = 0,
                share: slice = slice(None)) -> torch.Tensor:
    """Augment and normalise one training batch, or a share of it.

    images: uint8 (B, 3, H, W), channels-last. indices: int64 (B,), the samples' numbers (alternating flip follows
    them from epoch to epoch). epoch: from 0. flip: one of FLIPS. translate: pixels, 0 for none. padding: one of
    PADDINGS. cutout: side of the square in pixels, 0 for none. mean, std: a channel, in pixel values 0..255.
    side: of the crops in pixels, 0 for whole images; a crop lies anywhere in its image, and `translate` may take it beyond.
    brightness: largest shift, in standard deviations; contrast: largest relative change; either way, an image (see `jitter`).
    blur: largest weight of a pixel's neighbour (see `soften`); noise: largest deviation of Gaussian noise, in standard deviations.
    Each image draws its own, from 0 to the largest; 0 is off.
    whole, share: the images are those at `share` of a batch of `whole` (0: all of it). Random numbers are drawn for all of it,
    so that several processes with a share each see together what one would see.
    Returns `dtype` (B, 3, H, W), or (B, 3, side, side), channels-last. Raises ValueError for a flip or padding it does not know.
    """
    _, _, height, width = images.shape
    count = whole or len(images)
    if flip not in FLIPS:
        raise ValueError(f"flip: {flip!r} is not one of {', '.join(FLIPS)}")
    flips = {"none": lambda: None, "random": lambda: random_flips(count, generator)[share],
             "alternating": lambda: alternating_flips(indices, epoch, seed)}[flip]()
    spare = height - side if side else 0
    most, least = max(translate, spare // 2), -max(translate, (spare + 1) // 2)    # the middle of an odd one is half a pixel off
    shifts = random_shifts(count, most, generator, least)[share] if most > least else None
    if flips is not None or shifts is not None:
        images = flip_and_shift(images, flips, shifts, padding, mean, side)
    if cutout:
        images = cut_out(images, random_centres(count, *images.shape[2:], generator)[share], cutout, mean)
    if not (brightness or contrast or blur or noise):
        return normalise(images, mean, std, dtype)
    images = normalise(images, mean, std, torch.float32)
    if blur:
        images = soften(images, random_amounts(count, blur, generator)[share])
    if brightness or contrast:
        images = jitter(images, random_jitter(count, brightness, contrast, generator)[share])
    if noise:
        images = add_noise(images, random_amounts(count, noise, generator)[share],
                           random_normal(count, images.shape[1:], generator)[share])
    return images.to(dtype)


def random_flips(count: int, generator: torch.Generator) -> torch.Tensor:
    """bool (count,): each true with probability one half."""
    return torch.rand(count, generator=generator, device=generator.device) < 0.5


def alternating_flips(indices: torch.Tensor, epoch: int, seed: int) -> torch.Tensor:
    """bool (B,): a fixed random half of the samples in even epochs, the other half in odd ones.

    Alternating flip (Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single A100 GPU", arXiv 2404.00498, section 3.6):
    over two successive epochs each image is seen once in either orientation. The half is chosen by a hash of
    (index, seed), splitmix64's mixing steps in wrapping int64 arithmetic, so it needs no table and is the same on
    every device and in every batch composition.
    """
    z = indices.to(torch.int64) + _wrap(0x9E3779B97F4A7C15 * (seed + 1))
    z = (z ^ _shift_right(z, 30)) * _wrap(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _wrap(0x94D049BB133111EB)
    z = z ^ _shift_right(z, 31)
    return ((z + epoch) & 1).bool()


def _wrap(value: int) -> int:
    """The int64 with the low 64 bits of `value`."""
    return (value + 2**63) % 2**64 - 2**63


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of int64 (torch's is arithmetic: it copies the sign bit down)."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def random_shifts(count: int, most: int, generator: torch.Generator, least: int | None = None) -> torch.Tensor:
    """int64 (count, 2) of (down, right) pixels, each uniform in [least, most]; without `least` in [-most, most]."""
    return torch.randint(-most if least is None else least, most + 1, (count, 2), generator=generator, device=generator.device)


def random_centres(count: int, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """int64 (count, 2) of (row, column), uniform over the image."""
    unit = torch.rand(count, 2, generator=generator, device=generator.device)
    return (unit * _constants((height, width), unit)).long()


def random_jitter(count: int, brightness: float, contrast: float, generator: torch.Generator) -> torch.Tensor:
    """float32 (count, 2) of (shift, factor), uniform in [-brightness, brightness] and [1 - contrast, 1 + contrast]."""
    unit = torch.rand(count, 2, generator=generator, device=generator.device) * 2 - 1
    return unit * _constants((brightness, contrast), unit) + _constants((0.0, 1.0), unit)


def random_amounts(count: int, most: float, generator: torch.Generator) -> torch.Tensor:
    """float32 (count,), uniform in [0, most)."""
    return torch.rand(count, generator=generator, device=generator.device) * most


def random_normal(count: int, shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """float32 (count, C, H, W) for an image's `shape`, channels-last: independent standard normal values."""
    channels, height, width = shape
    return torch.randn(count, height, width, channels, generator=generator, device=generator.device).permute(0, 3, 1, 2)


def flip_and_shift(images: torch.Tensor, flips: torch.Tensor | None, shifts: torch.Tensor | None, padding: str,
                   fill: Sequence[float], side: int = 0) -> torch.Tensor:
    """Mirror some images left to right, then move each by its own number of pixels and keep the middle, in one gather.

    images: uint8 (B, 3, H, W), channels-last. flips: bool (B,), None for no flip. shifts: int64 (B, 2), pixels (down,
    right), smaller than the image's side, None for no shift. padding, what is seen beyond the old edge: `reflect`
    mirrors about the edge pixel (which is not repeated), `constant` shows the colour `fill` (a channel, 0..255;
    rounded), `zero` black. side: of the square that is kept, in pixels, 0 for all; where it cannot lie in the very middle, half
    a pixel up and left of it. Returns the same dtype and layout, (B, 3, side, side). Raises ValueError for an unknown padding.

    Shifting is padding and cropping (He et al., arXiv 1512.03385, section 4.2) without the padded copy: the source
    row and column of each output pixel are computed on (B, H) and (B, W) integers, then all pixels move once.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding: {padding!r} is not one of {', '.join(PADDINGS)}")
    count, channels, height, width = images.shape
    tall, wide = (side, side) if side else (height, width)
    rows = torch.arange(tall, device=images.device).expand(count, tall) + (height - tall) // 2
    columns = torch.arange(wide, device=images.device).expand(count, wide) + (width - wide) // 2
    inside = None
    if shifts is not None:
        rows, columns = rows - shifts[:, :1], columns - shifts[:, 1:]
        if padding == "reflect":
            rows, columns = _reflect(rows, height), _reflect(columns, width)
        else:
            inside = _box(_within(rows, height), _within(columns, width), channels)
            rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    if flips is not None:
        columns = torch.where(flips[:, None], (width - 1) - columns, columns)
    pixels = images.permute(0, 2, 3, 1).reshape(-1, channels)    # a view where the batch is channels-last
    rows = rows + torch.arange(count, device=images.device)[:, None] * height
    source = rows[:, :, None] * width + columns[:, None, :]
    moved = pixels.index_select(0, source.flatten()).view(count, tall, wide * channels)
    if inside is not None:
        beyond = fill if padding == "constant" else (0,) * channels
        moved = torch.where(inside, moved, _row([round(value) for value in beyond], wide, images))
    return moved.view(count, tall, wide, channels).permute(0, 3, 1, 2)


def cut_out(images: torch.Tensor, centres: torch.Tensor, side: int, fill: Sequence[float]) -> torch.Tensor:
    """Cover a square of `side` pixels around each image's centre (int64 (B, 2): row, column) with colour `fill`.

    Cutout (DeVries and Taylor, arXiv 1708.04552, section 3.2): the square may lie partly outside the image. The
    square spans `centre - side // 2` up to, not including, `centre - side // 2 + side`.
    """
    count, channels, height, width = images.shape
    first = centres - side // 2
    rows = torch.arange(height, device=images.device) - first[:, :1]
    columns = torch.arange(width, device=images.device) - first[:, 1:]
    covered = _box(_within(rows, side), _within(columns, side), channels)
    flat = images.permute(0, 2, 3, 1).reshape(count, height, width * channels)
    flat = torch.where(covered, _row([round(value) for value in fill], width, images), flat)
    return flat.view(count, height, width, channels).permute(0, 3, 1, 2)


def normalise(images: torch.Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> torch.Tensor:
    """(images - mean) / std a channel, rounded once to `dtype`. uint8 (B, 3, H, W) -> `dtype`, same layout."""
    count, channels, height, width = images.shape
    flat = images.permute(0, 2, 3, 1).reshape(count, height, width * channels).to(torch.float32)
    scale = _row([1 / s for s in std], width, flat)
    offset = _row([-m / s for m, s in zip(mean, std)], width, flat)
    flat = torch.addcmul(offset, flat, scale).to(dtype)
    return flat.view(count, height, width, channels).permute(0, 3, 1, 2)


def jitter(images: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """Brightness and contrast an image: (image + shift) * factor. images: float (B, 3, H, W), normalised; changed in place and
    returned. amounts: float (B, 2), shift and factor. As in Krizhevsky's cuda-convnet tutorial, on normalised values.
    """
    shift, factor = amounts[:, :, None, None, None].unbind(1)
    return images.add_(shift).mul_(factor)


def soften(images: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """Blur each image along both axes with the kernel (a, 1 - 2 a, a), its edge pixels repeated. images: float (B, 3, H, W).
    amounts: float (B,), the a of each, from 0 to 1/3, which is the mean of three. Returns a new tensor of the same layout.
    """
    a = amounts[:, None, None, None]
    for axis in (2, 3):
        first, last = images.narrow(axis, 0, 1), images.narrow(axis, images.shape[axis] - 1, 1)
        before = torch.cat([first, images.narrow(axis, 0, images.shape[axis] - 1)], axis)
        after = torch.cat([images.narrow(axis, 1, images.shape[axis] - 1), last], axis)
        images = images + a * (before + after - 2 * images)
    return images


def add_noise(images: torch.Tensor, amounts: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
    """images + amounts * normal: float (B, 3, H, W), changed in place and returned; (B,); (B, 3, H, W)."""
    return images.addcmul_(normal, amounts[:, None, None, None])


def _reflect(position: torch.Tensor, size: int) -> torch.Tensor:
    """Positions in (-size, 2 * size - 1) mirrored about the first and the last pixel into [0, size)."""
    return (size - 1) - ((size - 1) - position.abs()).abs()


def _within(position: torch.Tensor, size: int) -> torch.Tensor:
    return (position >= 0) & (position < size)


# The two helpers below work on rows of W * 3 values: an innermost dimension of 3 channels would leave the vector
# units of a CPU idle (normalising was three times slower with it).

def _row(values: Sequence[float], width: int, like: torch.Tensor) -> torch.Tensor:
    """One value a channel, repeated along an image row: (W * 3,) of `like`'s dtype, on its device. Not to be changed in place."""
    return _constants(tuple(values), like, width)


def _constants(values: tuple[float, ...], like: torch.Tensor, times: int = 1) -> torch.Tensor:
    """`values`, `times` after one another, of `like`'s dtype, on its device. Not to be changed in place: they are kept."""
    return _kept(values, times, like.dtype, like.device)


@lru_cache(maxsize=256)
def _kept(values: tuple[float, ...], times: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # Bringing numbers to a GPU waits until it has done all that was queued before: once a process is enough.
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype).repeat(times).to(device)


def _box(rows: torch.Tensor, columns: torch.Tensor, channels: int) -> torch.Tensor:
    """bool (B, H, W * 3), true where both the row (bool (B, H)) and the column (bool (B, W)) are true."""
    return rows[:, :, None] & columns.repeat_interleave(channels, dim=1)[:, None, :]
