"""clock: lanes never overlap and add up to the whole."""
import time

import pytest
import torch

from seresnet.clock import Clock


@pytest.fixture
def ticks(monkeypatch):
    """A perf_counter that moves only when told to."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def tick(seconds):
        now[0] += seconds
    return tick


def test_an_inner_lane_pauses_the_outer_one(ticks):
    clock = Clock(torch.device("cpu"))
    ticks(7)    # before the first lane: nobody's
    with clock.lane("outer"):
        ticks(1)
        with clock.lane("inner"):
            ticks(2)
            with clock.lane("outer"):
                ticks(4)
        ticks(8)
    ticks(16)
    with clock.lane("inner"):
        ticks(32)
    assert clock.split() == {"outer": 13, "inner": 34} and clock.seconds("never") == 0


def test_waiting_books_what_the_items_take_and_not_what_is_done_with_them(ticks):
    def slow():
        for i in range(3):
            ticks(1)
            yield i
        ticks(5)    # finding out that there is no more is waiting too
    clock, seen = Clock(torch.device("cpu")), []
    with clock.lane("train"):
        for item in clock.waiting(slow(), "wait"):
            seen.append(item)
            ticks(10)
    assert seen == [0, 1, 2] and clock.split() == {"wait": 8, "train": 30}


def test_leaving_early_closes_the_source_at_once():
    closed = []

    def source():
        try:
            yield from range(10)
        finally:
            closed.append(True)
    clock = Clock(torch.device("cpu"))
    waiting = clock.waiting(source(), "wait")
    for item in waiting:
        if item == 2:
            break
    waiting.close()
    assert closed == [True]


def test_an_error_inside_a_lane_is_booked_and_passed_on(ticks):
    clock = Clock(torch.device("cpu"))
    with pytest.raises(KeyError):
        with clock.lane("outer"):
            with clock.lane("inner"):
                ticks(3)
                raise KeyError
    with clock.lane("outer"):
        ticks(1)
    assert clock.split() == {"inner": 3, "outer": 1}


def test_only_full_lanes_wait_for_a_gpu(monkeypatch):
    waits = []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    clock = Clock(torch.device("cuda", 0))
    list(clock.waiting([1, 2], "wait"))
    assert waits == []
    with clock.lane("train"):
        pass
    assert len(waits) == 2
