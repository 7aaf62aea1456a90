"""evaluate: views are averaged before the decision, every sample counts once, against one-by-one arithmetic."""
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from seresnet import config
from seresnet.augment import normalise
from seresnet.evaluate import VIEWS, evaluate

MEAN, STD = (120.0, 121.0, 122.0), (60.0, 61.0, 62.0)
CPU = torch.device("cpu")


class Net(nn.Module):
    """Small, not symmetric under flips, and different in training mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3 * 6 * 6, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.linear(self.dropout(x.flatten(1)))


def images_and_labels(count):
    generator = torch.Generator().manual_seed(1)
    storage = torch.randint(0, 256, (count, 6, 6, 3), dtype=torch.uint8, generator=generator)
    return storage.permute(0, 3, 1, 2), torch.randint(0, 4, (count,), generator=generator)


def in_batches(images, labels, size):
    for i in range(0, len(images), size):
        yield SimpleNamespace(images=images[i:i + size], labels=labels[i:i + size])


def run(net, images, labels, size, tta, samples=None):
    return evaluate(net, in_batches(images, labels, size), samples=samples or len(images), mean=MEAN, std=STD, tta=tta,
                    dtype=torch.float32, device=CPU)


def test_words_of_the_config_are_the_views():
    assert config.Evaluate.__dataclass_fields__["tta"].metadata["limits"]["one_of"] == tuple(VIEWS)


@pytest.mark.parametrize("count, size", [(1, 64), (7, 3), (100, 64), (513, 64)])
def test_flip_averages_probabilities_and_counts_each_sample_once(count, size):
    net = Net().train()
    images, labels = images_and_labels(count)
    result = run(net, images, labels, size, "flip")
    assert net.training, "the mode was not put back"
    net.eval()
    correct = {"plain": 0, "tta": 0}
    loss = {"plain": 0.0, "tta": 0.0}
    with torch.no_grad():
        for image, label in zip(images, labels):
            x = normalise(image[None], MEAN, STD, torch.float32)
            p = {"plain": net(x).softmax(1)[0]}
            p["tta"] = (p["plain"] + net(x.flip(3)).softmax(1)[0]) / 2
            for kind in p:
                correct[kind] += int(p[kind].argmax()) == int(label)
                loss[kind] -= float(p[kind][label].log())
    for kind, totals in (("plain", result.plain), ("tta", result.tta)):
        assert (totals.correct, totals.seen) == (correct[kind], count)
        assert totals.loss == pytest.approx(loss[kind] / count, rel=1e-4)


def test_without_views_both_results_are_the_same():
    images, labels = images_and_labels(50)
    result = run(Net(), images, labels, 16, "none")
    assert result.plain.correct == result.tta.correct and result.plain.loss == pytest.approx(result.tta.loss)


def test_a_missing_or_repeated_sample_is_an_error():
    images, labels = images_and_labels(20)
    for samples in (19, 21):
        with pytest.raises(RuntimeError, match=f"evaluated 20 samples, the split has {samples}"):
            run(Net(), images, labels, 8, "flip", samples=samples)


def test_the_mode_is_put_back_after_an_error():
    net = Net().train()
    with pytest.raises(RuntimeError):
        run(net, torch.zeros(2, 3, 5, 5, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), 2, "none")
    assert net.training
