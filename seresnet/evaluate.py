"""Exact accuracy with test-time augmentation: views averaged before the decision, every sample counted once."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from seresnet.augment import normalise
from seresnet.loss import Tally, Totals

# What each kind of test-time augmentation looks at: functions of the normalised batch.
VIEWS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], ...]] = {
    "none": (lambda images: images,),
    "flip": (lambda images: images, lambda images: images.flip(3)),
}


class Evaluation(NamedTuple):
    """Totals of the plain images, and of the views together."""

    plain: Totals
    tta: Totals


def log_probabilities(model: nn.Module, images: torch.Tensor, tta: str, dtype: torch.dtype
                      ) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, float32 (B, K) twice: of the images as they are, and of the mean probability over the views.

    images: normalised `dtype` (B, 3, H, W), channels-last. tta: a key of VIEWS. The first view is the image itself.
    """
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        views = [F.log_softmax(model(view(images)).float(), dim=1) for view in VIEWS[tta]]
    mean = torch.logsumexp(torch.stack(views), dim=0) - math.log(len(views))
    return views[0], mean


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable, *, samples: int, mean: Sequence[float], std: Sequence[float],
             tta: str, dtype: torch.dtype, device: torch.device) -> Evaluation:
    """Accuracy and mean cross-entropy of `model` over `batches` (of loader.Batch), with and without the views.

    samples: how many there must be; RuntimeError where another number was seen. mean, std: a channel, in pixel values,
    those of the training split. The model is in evaluation mode while it runs and as it was afterwards.
    """
    was_training = model.training
    model.eval()
    plain, together = Tally(device), Tally(device)
    try:
        for batch in batches:
            first, mean_view = log_probabilities(model, normalise(batch.images, mean, std, dtype), tta, dtype)
            for tally, scores in ((plain, first), (together, mean_view)):
                tally.add(scores, batch.labels, F.nll_loss(scores, batch.labels))
    finally:
        model.train(was_training)
    result = Evaluation(plain.read(), together.read())
    if result.plain.seen != samples:
        raise RuntimeError(f"evaluated {result.plain.seen} samples, the split has {samples}")
    return result
