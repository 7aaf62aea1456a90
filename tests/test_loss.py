"""loss: label smoothing against its definition, and counts that are exact."""
import pytest
import torch

from seresnet.loss import Difficulty, Tally, smoothed_cross_entropy


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


def noted(difficulty, losses):
    """Let each image of `losses`, {number: loss}, be seen with that loss: of two classes, log(1 + exp(-margin))."""
    margin = -torch.tensor(list(losses.values()), dtype=torch.float64).expm1().log()
    logits = torch.stack([torch.zeros_like(margin), margin], 1)
    difficulty.note(logits, torch.ones(len(losses), dtype=torch.int64), torch.tensor(list(losses)))


def chosen(difficulty, count, among):
    return torch.nonzero(difficulty.hardest(count, torch.tensor(among))).flatten().tolist()


def test_the_hardest_are_those_of_largest_last_loss():
    difficulty, everyone = Difficulty(6, torch.device("cpu")), list(range(6))
    assert chosen(difficulty, 2, [5, 1, 3]) == [1, 5], "never seen: as hard as can be, the first of them"
    difficulty.begin_epoch()
    noted(difficulty, {4: 0.1, 1: 2.0, 0: 0.5})
    noted(difficulty, {3: 3.0})
    assert chosen(difficulty, 3, everyone) == [0, 1, 2], "an epoch goes by what was known at its beginning"
    difficulty.begin_epoch()
    assert chosen(difficulty, 2, everyone) == [2, 5] and chosen(difficulty, 4, everyone) == [1, 2, 3, 5]
    assert chosen(difficulty, 2, [0, 1, 4]) == [0, 1]
    noted(difficulty, {1: 0.2, 3: 0.3, 2: 0.4, 5: 0.05})
    difficulty.begin_epoch()
    assert chosen(difficulty, 2, everyone) == [0, 2], "0 was left out, keeps its 0.5, and is back"


def test_losses_are_those_of_the_labels_without_smoothing():
    torch.manual_seed(0)
    difficulty = Difficulty(9, torch.device("cpu"))
    logits, labels, indices = torch.randn(4, 3).bfloat16(), torch.tensor([2, 0, 1, 1]), torch.tensor([8, 0, 5, 3])
    difficulty.note(logits, labels, indices)
    difficulty.note(logits[:0], labels[:0], indices[:0])
    now = difficulty.state()["now"]
    expected = [-float(torch.log_softmax(row.double(), 0)[label]) for row, label in zip(logits, labels)]
    assert now[indices].tolist() == pytest.approx(expected, rel=1e-5) and now.isinf().sum() == 5


def test_difficulty_goes_on_inside_an_epoch():
    difficulty, everyone = Difficulty(5, torch.device("cpu")), list(range(5))
    noted(difficulty, {i: 1.0 + i for i in everyone})
    difficulty.begin_epoch()
    noted(difficulty, {4: 0.5})
    again = Difficulty(5, torch.device("cpu"))
    again.go_on_from(difficulty.state())
    assert chosen(again, 2, everyone) == chosen(difficulty, 2, everyone) == [3, 4]
    for one in (again, difficulty):
        noted(one, {3: 0.4})
        one.begin_epoch()
    assert chosen(again, 2, everyone) == chosen(difficulty, 2, everyone) == [1, 2]
    assert torch.equal(again.state()["now"], difficulty.state()["now"])


def test_difficulty_of_several_processes_is_of_all():
    rows = {}
    processes = [Difficulty(4, torch.device("cpu"), lambda row: torch.stack(rows["all"])) for _ in range(2)]
    noted(processes[0], {0: 1.0, 2: 3.0})
    noted(processes[1], {3: 2.0})
    rows["all"] = [process._noted.clone() for process in processes]
    for process in processes:
        process.begin_epoch()
        assert chosen(process, 2, [0, 2, 3]) == [2, 3] and chosen(process, 1, [0, 1, 2, 3]) == [1]
