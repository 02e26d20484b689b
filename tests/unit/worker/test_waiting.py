"""Waiting on several events, and the speed that is shown."""

from __future__ import annotations

import threading

import pytest

from cbtm_worker.speed import Speed
from cbtm_worker.waiting import AnyOf


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_any_of_several_events_ends_a_wait() -> None:
    first, second = threading.Event(), threading.Event()
    both = AnyOf(first, second)
    assert not both.is_set()
    assert not both.wait(0.001)
    threading.Timer(0.01, second.set).start()
    assert both.wait()
    assert both.is_set()
    assert both.wait(0)


def test_speed_is_that_of_the_last_seconds() -> None:
    clock = Clock()
    speed = Speed(clock)
    assert speed.tokens_per_second == 0.0
    for _ in range(10):
        clock.now += 1.0
        speed.add(100)
    assert speed.tokens_per_second == pytest.approx(100.0)
    for _ in range(30):
        clock.now += 1.0
        speed.add(500)
    assert speed.tokens_per_second == pytest.approx(500.0)
