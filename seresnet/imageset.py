"""What a set of labelled images is, what has to be true of it, and its statistics."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Split:
    """images: uint8 (N, H, W, 3), RGB. labels: int64 (N,), in [0, classes)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class ImageSet:
    """A whole data set: its short `name`, one line on where it comes `source` from, class names, both splits; whether the test split was
    held back of a set that has none."""

    name: str
    source: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    held_back: bool = False


def problems_of_names(classes: Sequence[str]) -> Iterable[str]:
    """What is wrong with class names, a line each. They end up in tables, CSV files and on screens, and people make folders of
    them: a name is printable text of up to 200 characters that leads to no other folder, and none is there twice."""
    for name in classes:
        if not name.strip() or len(name) > 200 or not name.isprintable() or "/" in name or "\\" in name or name in (".", ".."):
            yield f"class {name[:50]!r}: expected a name of 1 to 200 printable characters that is no path"
    if len(set(classes)) < len(classes):
        yield f"class {next(name for name in classes if classes.count(name) > 1)!r} is there twice"


def problems_of(images: ImageSet, for_training: bool = True) -> Iterable[str]:
    """What is wrong with `images`, a line each: dtype, shape, label range and, for a set to train on, classes without images. Another
    may have test images alone, of some of the classes."""
    if for_training and len(images.classes) < 2:
        yield f"has {len(images.classes)} class, expected at least 2"
    yield from problems_of_names(images.classes)
    for name, split in (("train", images.train), ("test", images.test)):
        if split.images.dtype != np.uint8 or split.images.ndim != 4 or split.images.shape[3] != 3:
            yield f"{name} images are {split.images.dtype} {split.images.shape}, expected uint8 (N, H, W, 3)"
        if split.labels.dtype != np.int64 or split.labels.shape != split.images.shape[:1]:
            yield (f"{name} labels are {split.labels.dtype} {split.labels.shape}, expected int64 "
                   f"({len(split.images)},), one an image")
        elif not len(split.labels):
            if for_training or name == "test":
                yield f"{name} has no images"
        elif split.labels.min() < 0 or split.labels.max() >= len(images.classes):
            yield (f"{name} labels lie in [{split.labels.min()}, {split.labels.max()}], expected "
                   f"[0, {len(images.classes) - 1}]")
        elif for_training and name == "train":
            missing = np.flatnonzero(np.bincount(split.labels, minlength=len(images.classes)) == 0)
            if len(missing):
                yield f"train has no image of class {images.classes[missing[0]]}" + (
                    ": labels count from 0, so subtract 1 where they count from 1" if missing[0] == 0 and images.classes[0] == "0" else "")
    if images.train.images.shape[1:] != images.test.images.shape[1:]:
        yield (f"train images are {images.train.images.shape[1:3]} pixels, test images {images.test.images.shape[1:3]}: "
               "bring all to one size first")


def channel_statistics(parts: Iterable[np.ndarray]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation a channel of images, over all pixels of all of them, in pixel values.

    parts: uint8 (N, H, W, 3) each, together the images. Exact: both come from a histogram of the 256 values, whose sums are
    integers.
    """
    values, counts = np.arange(256, dtype=np.int64), np.zeros((3, 256), np.int64)
    for images in parts:
        for start in range(0, len(images), 4096):    # bincount widens to 8 bytes a pixel: some at a time
            for channel in range(3):
                counts[channel] += np.bincount(images[start:start + 4096, ..., channel].ravel(), minlength=256)
    total = int(counts[0].sum())
    means = [int(of_channel @ values) / total for of_channel in counts]
    stds = [(int(of_channel @ values**2) / total - mean**2) ** 0.5 for of_channel, mean in zip(counts, means)]
    return tuple(means), tuple(stds)
