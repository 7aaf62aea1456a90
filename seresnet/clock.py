"""A stop-watch with named lanes: every second between its first and last lane belongs to exactly one of them."""
from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


class Clock:
    """Adds up seconds in named lanes. A lane opened inside another pauses the outer one, so lanes never overlap.

    Where `device` is a GPU, both edges of a `lane` wait for it, so that work is booked where it was asked for and not
    where somebody happened to wait; `waiting` measures the host alone, so that it may stand inside a training loop.
    On a CPU nothing is ever waited for.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._mark = 0.0

    @contextmanager
    def lane(self, name: str, wait_for_device: bool = True) -> Iterator[None]:
        """Book the time inside the block to `name`, less the lanes that are opened inside it."""
        self._book(wait_for_device)
        self._open.append(name)
        ended = False
        try:
            yield
            ended = True
        finally:
            self._book(wait_for_device and ended)    # after an error the device may wait for another process that has gone
            self._open.pop()

    def waiting(self, items: Iterable[T], name: str) -> Iterator[T]:
        """`items`, with the time that the host spends waiting for each booked to the lane `name`."""
        iterator = iter(items)
        try:
            while True:
                with self.lane(name, wait_for_device=False):
                    try:
                        item = next(iterator)
                    except StopIteration:
                        return
                yield item
        finally:
            if hasattr(iterator, "close"):
                iterator.close()    # leaving early has to reach the loader at once, not when memory is collected

    def seconds(self, name: str) -> float:
        """Seconds booked to `name` so far; 0 for a lane that was never opened."""
        return self._seconds.get(name, 0.0)

    def split(self) -> dict[str, float]:
        """Seconds booked so far, a lane; of open lanes, those up to the last edge of a lane."""
        return dict(self._seconds)

    def _book(self, wait_for_device: bool) -> None:
        if wait_for_device and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] = self.seconds(self._open[-1]) + now - self._mark
        self._mark = now
