"""shift: each corruption grows with its severity, is the same for a seed, and does what its name says."""
import numpy as np
import pytest

from seresnet.shift import CORRUPTIONS, SEVERITIES, corrupt

RNG = np.random.default_rng(0)
# Smooth blobs with some texture: what photographs have.
WAVES = np.sin(np.linspace(0, 6, 32)[None, :, None, None] * RNG.uniform(0.5, 2, (20, 1, 1, 3)) + RNG.uniform(0, 6, (20, 1, 1, 3)))
IMAGES = np.clip(110 + 60 * WAVES * np.cos(np.linspace(0, 4, 32)[None, None, :, None]) + RNG.normal(0, 6, (20, 32, 32, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_distance_grows_with_severity(name):
    distances = []
    for severity in SEVERITIES:
        changed = corrupt(IMAGES, name, severity)
        assert changed.shape == IMAGES.shape and changed.dtype == np.uint8
        assert np.array_equal(changed, corrupt(IMAGES, name, severity))
        distances.append(np.abs(changed.astype(int) - IMAGES).mean())
    assert distances[0] > 0.1 and all(a <= b * 1.05 for a, b in zip(distances, distances[1:])) and distances[4] > 1.2 * distances[0]


def test_noise_has_its_deviation_and_its_seed():
    grey = np.full((50, 32, 32, 3), 128, np.uint8)
    for severity, deviation in zip(SEVERITIES, (10.2, 15.3, 20.4, 22.95, 25.5)):
        assert corrupt(grey, "noise", severity).std() == pytest.approx(deviation, rel=0.02)
    assert not np.array_equal(corrupt(grey, "noise", 1, seed=1), corrupt(grey, "noise", 1, seed=2))


def test_contrast_keeps_the_mean_and_its_share():
    changed = corrupt(IMAGES, "contrast", 2).astype(float)
    mean, before = changed.mean((1, 2)), IMAGES.astype(float)
    assert np.abs(mean - before.mean((1, 2))).max() < 0.6
    assert np.allclose(changed.std((1, 2)), 0.5 * before.std((1, 2)), atol=0.5)


def test_brightness_keeps_the_hue_and_raises_the_value():
    image = np.zeros((1, 2, 2, 3), np.uint8)
    image[0, 0, 0], image[0, 0, 1], image[0, 1, 0] = (100, 50, 0), (255, 10, 0), (0, 0, 0)
    changed = corrupt(image, "brightness", 2)[0]    # 10% of the range: 25.5
    assert changed[0, 0].tolist() == [126, 63, 0] and changed[0, 1].tolist() == [255, 10, 0]
    assert set(changed[1, 0].tolist()) == {26}


def test_blur_and_pixelation_leave_an_even_image_alone():
    even = np.full((2, 32, 32, 3), 77, np.uint8)
    for name in ("blur", "pixelation", "contrast"):
        assert np.array_equal(corrupt(even, name, 5), even)


@pytest.mark.parametrize("name, severity", [("fog", 1), ("noise", 0), ("noise", 6)])
def test_what_there_is_not_is_refused(name, severity):
    with pytest.raises(ValueError, match="expected one of noise"):
        corrupt(IMAGES, name, severity)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_parts_give_what_the_whole_gives(name, monkeypatch):
    whole = corrupt(IMAGES, name, 3)
    monkeypatch.setattr("seresnet.shift.PIXELS", 7 * IMAGES[0, ..., 0].size + 1)    # seven images at once
    assert np.array_equal(corrupt(IMAGES, name, 3), whole)
