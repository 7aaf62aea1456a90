"""loss: label smoothing against its definition, and counts that are exact."""
import pytest
import torch

from seresnet.loss import Tally, smoothed_cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_smoothed_cross_entropy_is_its_definition(smoothing, dtype):
    torch.manual_seed(0)
    logits, labels = (3 * torch.randn(7, 5)).to(dtype), torch.randint(0, 5, (7,))
    total = 0.0
    for row, label in zip(logits.double(), labels):
        log_p = row - torch.logsumexp(row, 0)
        for k in range(5):
            total -= float(log_p[k]) * (smoothing / 5 + (1 - smoothing) * (k == int(label)))
    got = smoothed_cross_entropy(logits, labels, smoothing)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(total / 7, rel=1e-5)


def test_tally_adds_up_uneven_batches_exactly():
    torch.manual_seed(0)
    tally, correct, loss_sum = Tally(torch.device("cpu")), 0, 0.0
    for size in (5, 8, 1):
        logits, labels = torch.randn(size, 4), torch.randint(0, 4, (size,))
        loss = smoothed_cross_entropy(logits, labels)
        tally.add(logits, labels, loss)
        correct += sum(int(row.argmax()) == int(label) for row, label in zip(logits, labels))
        loss_sum += loss.item() * size
    totals = tally.read()
    assert (totals.correct, totals.seen, totals.first_bad_step) == (correct, 14, -1)
    assert totals.accuracy == correct / 14 and totals.loss == pytest.approx(loss_sum / 14)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_tally_remembers_the_first_step_that_was_not_finite(bad):
    tally, logits, labels = Tally(torch.device("cpu")), torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    for value in (1.0, 2.0, bad, 1.0, float("nan")):
        tally.add(logits, labels, torch.tensor(value))
    assert tally.read().first_bad_step == 2
