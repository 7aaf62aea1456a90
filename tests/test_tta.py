"""tta: every view against a slow, obvious one; the mean of the views; what is not looked at again."""
import pytest
import torch
from torch import nn

from seresnet.tta import VIEWS, log_probabilities


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 16, 4)).eval()


def batch(count=9):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def moved(image, down, right):
    """(3, H, W), its edge mirrored about the outermost pixels."""
    height, width = image.shape[1:]

    def source(position, size):
        position = abs(position)
        return position if position < size else 2 * (size - 1) - position
    rows = [source(row - down, height) for row in range(height)]
    columns = [source(column - right, width) for column in range(width)]
    return image[:, rows][:, :, columns]


@torch.no_grad()
def test_six_views_are_the_image_its_shifts_and_their_mirror_images():
    images, model = batch(), net()
    _, got = log_probabilities(model, images, "flip_shift", torch.float32)
    for image, scores in zip(images, got):
        want = torch.zeros(4)
        for seen in (image, image.flip(2)):
            for share, by in ((0.25, 0), (0.125, 1), (0.125, -1)):
                want += share * model(moved(seen, by, by)[None]).softmax(1)[0]
        assert torch.allclose(scores.exp(), want, atol=1e-5)


@pytest.mark.parametrize("tta", VIEWS)
def test_the_first_view_is_the_image_and_the_shares_are_one(tta):
    assert torch.equal(VIEWS[tta][0][1](batch()), batch())
    assert sum(share for share, _ in VIEWS[tta]) == 1
    assert all(view(batch()).shape == batch().shape for _, view in VIEWS[tta])


@torch.no_grad()
@pytest.mark.parametrize("sure", [0.01, 0.35, 0.999])
def test_only_the_unsure_are_looked_at_again_whatever_stands_beside_them(sure):
    model, images, looked = net(), batch(40), []
    _, every = log_probabilities(model, images, "flip_shift", torch.float32)
    model.register_forward_hook(lambda *call: looked.append(len(call[1][0])))
    first, got = log_probabilities(model, images, "flip_shift", torch.float32, sure)
    unsure = first.exp().amax(1) <= sure
    assert torch.allclose(got[unsure], every[unsure], atol=1e-5) and torch.equal(got[~unsure], first[~unsure])
    assert looked == [40] + [int(unsure.sum())] * (5 if unsure.any() else 0)
    one_by_one = torch.cat([log_probabilities(model, image[None], "flip_shift", torch.float32, sure)[1] for image in images])
    assert torch.allclose(got, one_by_one, atol=1e-5)
