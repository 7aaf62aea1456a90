"""Test-time augmentation: the views that a net looks at, and their probabilities averaged before the decision."""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


def _mirrored(images: torch.Tensor) -> torch.Tensor:
    return images.flip(3)


def _moved(first: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The image one pixel further down and right (first = 0) or up and left (2), its edge mirrored."""
    def view(images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[2:]
        return F.pad(images, (1, 1, 1, 1), mode="reflect")[:, :, first:first + height, first:first + width]
    return view


# What each kind of test-time augmentation looks at: functions of the normalised batch, and their shares of the answer. The
# first is always the image itself. `flip_shift` and its shares are Jordan's (arXiv 2404.00498, section 3.5 and its listing).
VIEWS: dict[str, tuple[tuple[float, Callable[[torch.Tensor], torch.Tensor]], ...]] = {
    "none": ((1.0, lambda images: images),),
    "flip": ((0.5, lambda images: images), (0.5, _mirrored)),
    "flip_shift": ((0.25, lambda images: images), (0.25, _mirrored),
                   *((0.125, view) for first in (0, 2) for view in
                     (_moved(first), lambda images, move=_moved(first): move(_mirrored(images))))),
}


def log_probabilities(model: nn.Module, images: torch.Tensor, tta: str, dtype: torch.dtype, sure: float = 1.0
                      ) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, float32 (B, K) twice: of the images as they are, and of the mean probability over the views.

    images: normalised `dtype` (B, 3, H, W), channels-last. tta: a key of VIEWS. sure: an image of which the first view gives
    some class more than this probability is not looked at again; 1 looks at all views of all images. That costs a GPU one
    wait a batch, to learn how many are left.
    """
    shares = VIEWS[tta]

    def look(view: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            return F.log_softmax(model(view(at)).float(), dim=1)
    first = look(shares[0][1], images)
    if len(shares) == 1:
        return first, first
    unsure = torch.nonzero(first.amax(1) <= math.log(sure)).flatten() if sure < 1 else None
    if unsure is not None and not len(unsure):
        return first, first
    again, seen = (images, first) if unsure is None else (images[unsure], first[unsure])
    looks = [seen, *(look(view, again) for _, view in shares[1:])]
    mean = torch.logsumexp(torch.stack([logs + math.log(share) for logs, (share, _) in zip(looks, shares)]), dim=0)
    return first, mean if unsure is None else first.index_copy(0, unsure, mean)
