"""Label-smoothed loss, and counts kept on the device until somebody reads them."""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


def smoothed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy against labels smoothed towards the uniform distribution; a float32 scalar.

    logits: (B, K), any float dtype; computed in float32. labels: int64 (B,) in [0, K). smoothing: the share in [0, 1)
    of the target's mass that is spread evenly over all K classes (Szegedy et al., arXiv 1512.00567, section 7).
    """
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
    """

    def __init__(self, device: torch.device):
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._seen = 0
        self._steps = 0

    def state(self) -> dict[str, torch.Tensor | int]:
        """What `from_state` needs to count on from here."""
        return {"correct": self._correct, "loss_sum": self._loss_sum, "first_bad": self._first_bad, "seen": self._seen,
                "steps": self._steps}

    @classmethod
    def from_state(cls, state: dict[str, torch.Tensor | int], device: torch.device) -> Tally:
        """A tally that counts on from what `state` gave."""
        tally = cls(device)
        tally._correct, tally._loss_sum, tally._first_bad = (state[k].to(device) for k in ("correct", "loss_sum", "first_bad"))
        tally._seen, tally._steps = state["seen"], state["steps"]
        return tally

    @torch.no_grad()
    def add(self, logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor) -> None:
        """Count one batch. logits: (B, K). labels: int64 (B,). loss: scalar, the batch's mean."""
        self._correct += (logits.argmax(1) == labels).sum()
        self._loss_sum += loss.detach().double() * len(labels)
        bad = ~torch.isfinite(loss) & (self._first_bad < 0)
        self._first_bad.masked_fill_(bad, self._steps)
        self._seen += len(labels)
        self._steps += 1

    def read(self) -> Totals:
        """The totals so far; the one place that waits for the device."""
        return Totals(int(self._correct), float(self._loss_sum), self._seen, int(self._first_bad))
