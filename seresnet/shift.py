"""Images as another camera, another day or another network might deliver them: six corruptions at five severities.

After Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations"
(arXiv 1903.12261), with the severities of their CIFAR-10-C, written for any small image. `imagecorruptions`, the package
that carries theirs, is no longer maintained and does not run with the numpy that we pin. Values beyond a pixel's range are clipped.
"""
from __future__ import annotations

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

SEVERITIES = range(1, 6)
PIXELS = 1000 * 64 * 64    # at once: noise and brightness want eight bytes and more a value for a while


def noise(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of standard deviation 4% to 10% of the range."""
    deviation = (0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1] * 255
    return _pixels(images + rng.normal(0.0, deviation, images.shape))


def blur(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur of radius 0.4 to 1 pixel in an image of 32, in proportion in others."""
    radius = (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1] * images.shape[1] / 32
    return _each(images, lambda image: image.filter(ImageFilter.GaussianBlur(radius)))


def brightness(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """The value of HSV raised by 5% to 30% of the range: every channel in proportion to the brightest."""
    raised = (0.05, 0.10, 0.15, 0.20, 0.30)[severity - 1] * 255
    images = images.astype(np.float32)
    value = images.max(3, keepdims=True)
    grey = np.minimum(value + raised, 255.0)    # of a black pixel, whose hue is undefined
    return _pixels(np.where(value > 0, images * (grey / np.maximum(value, 1e-6)), grey))


def contrast(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Each channel drawn towards its mean over the image, to 75% to 15% of its contrast."""
    kept = (0.75, 0.50, 0.40, 0.30, 0.15)[severity - 1]
    images = images.astype(np.float32)
    mean = images.mean((1, 2), keepdims=True)
    return _pixels(mean + kept * (images - mean))


def jpeg(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """JPEG compression of quality 80 to 40."""
    quality = (80, 65, 58, 50, 40)[severity - 1]

    def compressed(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)
    return _each(images, compressed)


def pixelation(images: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Averaged down to 95% to 65% of the side, and brought back by repeating pixels."""
    share = (0.95, 0.90, 0.85, 0.75, 0.65)[severity - 1]
    small, side = [max(1, int(s * share)) for s in images.shape[2:0:-1]], images.shape[2:0:-1]
    return _each(images, lambda image: image.resize(small, Image.Resampling.BOX).resize(side, Image.Resampling.NEAREST))


CORRUPTIONS: dict[str, Callable[[np.ndarray, int, np.random.Generator], np.ndarray]] = {
    function.__name__: function for function in (noise, blur, brightness, contrast, jpeg, pixelation)}


def corrupt(images: np.ndarray, corruption: str, severity: int, seed: int = 0) -> np.ndarray:
    """uint8 (N, H, W, 3) -> same. corruption: a key of CORRUPTIONS. severity: 1 to 5. The same for the same `seed`.

    Raises ValueError for a corruption or a severity that there is not.
    """
    if corruption not in CORRUPTIONS or severity not in SEVERITIES:
        raise ValueError(f"corruption {corruption!r} at severity {severity}: expected one of {', '.join(CORRUPTIONS)}, 1 to 5")
    rng = np.random.default_rng((seed, severity, list(CORRUPTIONS).index(corruption)))
    corrupted = np.empty_like(images)
    part = max(1, PIXELS // math.prod(images.shape[1:3]))
    for start in range(0, len(images), part):
        corrupted[start:start + part] = CORRUPTIONS[corruption](images[start:start + part], severity, rng)
    return corrupted


def _pixels(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _each(images: np.ndarray, change: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in images])
