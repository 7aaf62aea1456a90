"""Test-time augmentation: the views that a net looks at, and their probabilities averaged before the decision."""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

# What each kind of test-time augmentation looks at: functions of the normalised batch.
VIEWS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], ...]] = {
    "none": (lambda images: images,),
    "flip": (lambda images: images, lambda images: images.flip(3)),
}


def log_probabilities(model: nn.Module, images: torch.Tensor, tta: str, dtype: torch.dtype
                      ) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, float32 (B, K) twice: of the images as they are, and of the mean probability over the views.

    images: normalised `dtype` (B, 3, H, W), channels-last. tta: a key of VIEWS. The first view is the image itself.
    """
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        views = [F.log_softmax(model(view(images)).float(), dim=1) for view in VIEWS[tta]]
    mean = torch.logsumexp(torch.stack(views), dim=0) - math.log(len(views))
    return views[0], mean
