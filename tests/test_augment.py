"""augment: every whole-batch function against a slow, obvious one that handles one sample at a time."""
import numpy as np
import pytest
import torch

from seresnet import augment

MEAN, STD = (125.3, 122.9, 113.9), (63.0, 62.1, 66.7)


def batch(count=17, height=9, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    storage = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)
    return storage.permute(0, 3, 1, 2)


def slow_shift(image, down, right, padding, fill):
    """(3, H, W) array: pad by numpy, then crop."""
    most = 4
    pads = ((most, most), (most, most))
    if padding == "reflect":
        planes = [np.pad(plane, pads, mode="reflect") for plane in image]
    else:
        colours = [round(value) for value in fill] if padding == "constant" else (0, 0, 0)
        planes = [np.pad(plane, pads, constant_values=colour) for plane, colour in zip(image, colours)]
    top, left = most - down, most - right
    return np.stack([plane[top:top + image.shape[1], left:left + image.shape[2]] for plane in planes])


@pytest.mark.parametrize("padding", augment.PADDINGS)
@pytest.mark.parametrize("flipping", [False, True])
@pytest.mark.parametrize("shifting", [False, True])
def test_flip_and_shift_equal_the_reference_for_each_sample(padding, flipping, shifting):
    images, generator = batch(), torch.Generator().manual_seed(1)
    flips = augment.random_flips(len(images), generator) if flipping else None
    shifts = augment.random_shifts(len(images), 4, generator) if shifting else None
    got = augment.flip_and_shift(images, flips, shifts, padding, MEAN)
    for i, image in enumerate(images.numpy()):
        want = image[:, :, ::-1] if flipping and flips[i] else image
        if shifting:
            want = slow_shift(want, int(shifts[i, 0]), int(shifts[i, 1]), padding, MEAN)
        assert np.array_equal(got[i].numpy(), want), i
    assert got.dtype == torch.uint8 and got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("padding", augment.PADDINGS)
@pytest.mark.parametrize("side", [5, 8, 9])
def test_crops_are_the_middle_of_the_moved_image(padding, side):
    images = batch(width=9)
    shifts = augment.random_shifts(len(images), 4, torch.Generator().manual_seed(1))
    got = augment.flip_and_shift(images, None, shifts, padding, MEAN, side)
    first = (9 - side) // 2
    for i, image in enumerate(images.numpy()):
        moved = slow_shift(image, int(shifts[i, 0]), int(shifts[i, 1]), padding, MEAN)
        assert np.array_equal(got[i].numpy(), moved[:, first:first + side, first:first + side]), i
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_a_crop_lies_anywhere_in_its_image_and_nowhere_else():
    where = torch.arange(12 * 12, dtype=torch.uint8).view(1, 1, 12, 12).expand(4000, 3, 12, 12)
    images = where.contiguous(memory_format=torch.channels_last)
    crops = train_batch(images, flip="none", translate=0, cutout=0, side=8, mean=(0, 0, 0), std=(1, 1, 1))
    corners = crops[:, 0, 0, 0].long()
    assert sorted(set(corners.tolist())) == [row * 12 + column for row in range(5) for column in range(5)]
    assert torch.equal(crops[:, 0, 7, 7].long(), corners + 7 * 12 + 7)
    odd = train_batch(images, flip="none", translate=0, cutout=0, side=7, mean=(0, 0, 0), std=(1, 1, 1))[:, 0, 0, 0].long()
    assert sorted(set(odd.tolist())) == [row * 12 + column for row in range(6) for column in range(6)]
    beyond = train_batch(images, flip="none", translate=3, padding="zero", cutout=0, side=7, mean=(0, 0, 0), std=(1, 1, 1))
    assert (beyond[:, 0, 0, 6] == 0).any() and not (beyond[:, 0, 2, 2] == 0).any(), "one pixel beyond, at most"


def test_jitter_is_the_formula_for_each_image():
    images = batch()
    amounts = augment.random_jitter(len(images), 0.2, 0.1, torch.Generator().manual_seed(3))
    plain = augment.normalise(images, MEAN, STD, torch.float32)
    got = augment.jitter(plain.clone(memory_format=torch.preserve_format), amounts)
    for i, (shift, factor) in enumerate(amounts.tolist()):
        assert torch.allclose(got[i], (plain[i] + shift) * factor, atol=1e-6)
        assert abs(shift) <= 0.2 and 0.9 <= factor <= 1.1
    many = augment.random_jitter(5000, 0.2, 0.1, torch.Generator().manual_seed(4))
    assert many[:, 0].min() < -0.19 and many[:, 0].max() > 0.19 and many[:, 1].min() < 0.905 and many[:, 1].max() > 1.095
    assert not torch.equal(train_batch(images, brightness=0.2), train_batch(images, brightness=0.2, seed=1))


def test_blur_is_the_kernel_along_both_axes_of_each_image():
    images = torch.randn(5, 3, 7, 9, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    amounts = torch.tensor([0.0, 0.1, 0.25, 1 / 3, 0.02])
    got = augment.soften(images, amounts)
    for image, a, blurred in zip(images, amounts.tolist(), got):
        padded = np.pad(image.numpy(), ((0, 0), (1, 1), (1, 1)), mode="edge")
        kernel = np.outer([a, 1 - 2 * a, a], [a, 1 - 2 * a, a])
        want = sum(kernel[i, j] * padded[:, i:i + 7, j:j + 9] for i in range(3) for j in range(3))
        assert np.allclose(blurred.numpy(), want, atol=1e-6)
    assert got.is_contiguous(memory_format=torch.channels_last) and torch.equal(got[0], images[0])


def test_noise_has_the_deviation_that_each_image_drew():
    generator = torch.Generator().manual_seed(5)
    amounts = augment.random_amounts(2000, 0.5, generator)
    assert 0 <= amounts.min() < 0.01 and 0.49 < amounts.max() < 0.5
    normal = augment.random_normal(2000, (3, 8, 8), generator)
    got = augment.add_noise(torch.zeros(2000, 3, 8, 8).contiguous(memory_format=torch.channels_last), amounts, normal)
    assert torch.allclose(got.std((1, 2, 3)), amounts, rtol=0.35, atol=1e-3) and abs(float(normal.mean())) < 0.01
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("amount", [dict(blur=0.3), dict(noise=0.5), dict(brightness=0.2), dict(contrast=0.2)])
def test_every_amount_changes_the_images_and_follows_the_generator(amount):
    plain, changed, again = train_batch(batch()), train_batch(batch(), **amount), train_batch(batch(), **amount)
    assert torch.equal(changed, again) and not torch.allclose(plain, changed)
    assert not torch.equal(changed, train_batch(batch(), seed=1, **amount)) and changed.dtype == torch.float32


@pytest.mark.parametrize("side", [1, 4, 5, 30])
def test_cutout_equals_the_reference_for_each_sample(side):
    images = batch()
    centres = augment.random_centres(len(images), 9, 12, torch.Generator().manual_seed(2))
    got = augment.cut_out(images, centres, side, MEAN)
    for i, image in enumerate(images.numpy().copy()):
        top, left = int(centres[i, 0]) - side // 2, int(centres[i, 1]) - side // 2
        image[:, max(top, 0):max(top + side, 0), max(left, 0):max(left + side, 0)] = np.array([125, 123, 114])[:, None, None]
        assert np.array_equal(got[i].numpy(), image), i


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalise_is_the_formula_rounded_once(dtype):
    images = batch()
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
    want = (images.double() - mean) / std
    got = augment.normalise(images, MEAN, STD, dtype)
    assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(got.double(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_alternating_flip_shows_each_image_both_ways_in_two_epochs():
    indices = torch.arange(20_000)
    first, second, third = (augment.alternating_flips(indices, epoch, seed=3) for epoch in range(3))
    assert torch.equal(first, ~second) and torch.equal(first, third)
    assert abs(first.double().mean().item() - 0.5) < 0.02
    # neither the batch an image falls into nor its neighbours matter, and another seed chooses another half
    assert torch.equal(augment.alternating_flips(indices[777:900], 0, 3), first[777:900])
    assert abs((first ^ augment.alternating_flips(indices, 0, 4)).double().mean().item() - 0.5) < 0.02


def test_alternating_flip_hash_is_splitmix64():
    def splitmix(index, seed):
        mask = 2**64 - 1
        z = (index + 0x9E3779B97F4A7C15 * (seed + 1)) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return (z ^ (z >> 31)) & 1
    for seed in (0, 1, 12345):
        got = augment.alternating_flips(torch.arange(500), 0, seed).tolist()
        assert got == [bool(splitmix(i, seed)) for i in range(500)]


def test_random_draws_have_the_stated_ranges_and_reach_them():
    generator = torch.Generator().manual_seed(0)
    shifts = augment.random_shifts(5000, 2, generator)
    assert sorted(set(shifts.flatten().tolist())) == [-2, -1, 0, 1, 2]
    centres = augment.random_centres(5000, 9, 12, generator)
    assert set(centres[:, 0].tolist()) == set(range(9)) and set(centres[:, 1].tolist()) == set(range(12))
    assert abs(augment.random_flips(5000, generator).double().mean().item() - 0.5) < 0.04


def train_batch(images, seed=0, epoch=0, **changes):
    settings = dict(flip="random", translate=2, padding="reflect", cutout=4, mean=MEAN, std=STD, dtype=torch.float32)
    return augment.train_batch(images, torch.arange(len(images)), epoch, **{**settings, **changes},
                               generator=torch.Generator().manual_seed(seed))


def test_a_batch_depends_on_its_arguments_alone():
    images = batch()
    before, state = images.clone(), torch.get_rng_state()
    assert torch.equal(train_batch(images), train_batch(images))
    assert not torch.equal(train_batch(images), train_batch(images, seed=1))
    assert torch.equal(images, before), "the loader's buffer was written to"
    assert torch.equal(torch.get_rng_state(), state), "torch's global generator was used"


def test_without_augmentation_a_batch_is_only_normalised():
    images = batch()
    got = train_batch(images, flip="none", translate=0, cutout=0)
    assert torch.equal(got, augment.normalise(images, MEAN, STD, torch.float32))


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match="flip: 'sideways' is not one of none, random, alternating"):
        train_batch(batch(), flip="sideways")
    with pytest.raises(ValueError, match="padding: 'edge' is not one of reflect"):
        train_batch(batch(), padding="edge")
