"""Label-smoothed loss, counts kept on the device until somebody reads them, and which images are hard."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F


def smoothed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy against labels smoothed towards the uniform distribution; a float32 scalar.

    logits: (B, K), any float dtype; computed in float32. labels: int64 (B,) in [0, K). smoothing: the share in [0, 1)
    of the target's mass that is spread evenly over all K classes (Szegedy et al., arXiv 1512.00567, section 7).
    0 for no samples: one of several processes may have none of an epoch's last batch.
    """
    if not len(labels):
        return logits.float().sum()
    return F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)


class Totals(NamedTuple):
    """What a Tally holds, as Python numbers."""

    correct: int
    loss_sum: float
    seen: int
    first_bad_step: int    # counted from 0 since the tally began; -1 where every loss was finite

    @property
    def accuracy(self) -> float:
        """Correct / seen, a fraction."""
        return self.correct / self.seen

    @property
    def loss(self) -> float:
        """Mean loss a sample."""
        return self.loss_sum / self.seen


class Tally:
    """Adds up correct answers, loss and samples on the device: `add` never waits for it, `read` waits once.

    It also remembers the first step whose loss was not finite, which the sum alone could not name.
    gather: float64 (4,) -> (processes, 4), where several processes count together: then `state` and `read` are of all, and
    have to be asked for by all.
    """

    def __init__(self, device: torch.device, gather: Callable[[torch.Tensor], torch.Tensor] = lambda row: row[None]):
        self._gather = gather
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._loss_sum = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)    # which mps lacks
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._seen = 0
        self._steps = 0

    def state(self) -> dict[str, torch.Tensor | int]:
        """What `go_on_from` needs to count on from here: a value a process, (processes,), and the steps so far."""
        correct, loss_sum, seen, first_bad = self._rows().T
        return {"correct": correct.long(), "loss_sum": loss_sum, "seen": seen.long(), "first_bad": first_bad.long(),
                "steps": self._steps}

    def go_on_from(self, state: dict[str, torch.Tensor | int], rank: int = 0, world: int = 1) -> None:
        """Count on from what `state` gave: from the process's own counts, or, where there were not as many processes, in the
        first from those of all."""
        for name in ("correct", "loss_sum", "seen", "first_bad"):
            values = torch.as_tensor(state[name]).reshape(-1)    # a plain number where an early version wrote it
            value = values[min(rank, len(values) - 1)]
            if len(values) != world:
                value = values.max() if name == "first_bad" else values.sum() if rank == 0 else torch.zeros_like(values[0])
            if name == "seen":
                self._seen = int(value)
            else:
                mine = getattr(self, f"_{name}")
                setattr(self, f"_{name}", value.to(mine.device, mine.dtype))
        self._steps = state["steps"]

    @torch.no_grad()
    def add(self, logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor) -> None:
        """Count one batch. logits: (B, K). labels: int64 (B,). loss: scalar, the batch's mean."""
        self._correct += (logits.argmax(1) == labels).sum()
        self._loss_sum += loss.detach().to(self._loss_sum.dtype) * len(labels)
        bad = ~torch.isfinite(loss) & (self._first_bad < 0)
        self._first_bad.masked_fill_(bad, self._steps)
        self._seen += len(labels)
        self._steps += 1

    def read(self) -> Totals:
        """The totals so far; the one place that waits for the device."""
        rows = self._rows()
        correct, loss_sum, seen, _ = rows.sum(0).tolist()
        bad = [int(step) for step in rows[:, 3].tolist() if step >= 0]
        return Totals(int(correct), loss_sum, int(seen), min(bad, default=-1))

    def _rows(self) -> torch.Tensor:
        """float64 (processes, 4) on the CPU, where every count below 2**53 is exact: correct, loss sum, seen, first bad step."""
        return self._gather(torch.tensor([int(self._correct), float(self._loss_sum), self._seen, int(self._first_bad)],
                                         dtype=torch.float64))


class Difficulty:
    """The last loss of every training image, as training itself came by it, and with it the hardest of them.

    Hard-example selection: training on the images of largest loss alone saves the rest of an epoch. Jiang et al., "Accelerating
    Deep Learning by Focusing on the Biggest Losers", arXiv 1910.00762, draw images by the percentile of their loss; here they are
    the largest, by losses that are stale (there, section 3.3): those of the last time that an image was trained on, which cost
    nothing. An image that was left out keeps its loss, and comes back when those of the others have fallen below it. Losses are
    cross-entropies without label smoothing, of the augmented image.

    samples: of the whole set; images are known by their number in it. gather: float32 (samples,) -> (processes, samples), where
    several processes train together: then `begin_epoch` and `state` have to be asked for by all.
    """

    def __init__(self, samples: int, device: torch.device, gather: Callable[[torch.Tensor], torch.Tensor] = lambda row: row[None]):
        self._gather = gather
        self._before = torch.full((samples,), math.inf)    # at the epoch's beginning; infinite where never trained on
        self._noted = torch.full((samples,), math.nan, device=device)    # since then, by this process; NaN where not

    @torch.no_grad()
    def note(self, logits: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor) -> None:
        """Take in one batch; never waits for the device. logits: (B, K). labels, indices: int64 (B,)."""
        if len(labels):
            self._noted[indices] = F.cross_entropy(logits.float(), labels, reduction="none")

    def begin_epoch(self) -> None:
        """From here on `hardest` goes by all that was noted so far, and by nothing later."""
        self._before = self._merged()
        self._noted.fill_(math.nan)

    def hardest(self, count: int, among: torch.Tensor) -> torch.Tensor:
        """bool (samples,): the `count` images of largest loss among the numbers `among`, int64; of equals the first."""
        order = torch.sort(self._before[among], descending=True, stable=True).indices
        chosen = torch.zeros(len(self._before), dtype=torch.bool)
        chosen[among[order[:count]]] = True
        return chosen

    def state(self) -> dict[str, torch.Tensor]:
        """What `go_on_from` needs: float32 (samples,) twice, the losses of the epoch's beginning and those of now."""
        return {"before": self._before, "now": self._merged()}

    def go_on_from(self, state: dict[str, torch.Tensor]) -> None:
        """Be as when `state` was asked for; of several processes, in each."""
        self._before = state["before"]
        fresh = state["now"] != state["before"]
        self._noted.copy_(torch.where(fresh, state["now"], math.nan))

    def _merged(self) -> torch.Tensor:
        losses = self._before
        for noted in self._gather(self._noted.cpu()):    # no two processes are shown the same image in an epoch
            losses = torch.where(noted.isnan(), losses, noted)
        return losses
