"""Ctrl-C: the first asks, the second leaves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from cbtm_worker.signals import StopSignal


@pytest.fixture
def _handlers() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    # Whoever runs the tests may have them ignored (nohup).
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_asks_and_the_second_leaves_as_if_killed_by_it(number: signal.Signals) -> None:
    said, codes = threading.Event(), list[int]()
    stop = StopSignal(said.set, leave=codes.append)
    stop.install()
    assert not stop.requested.is_set()
    signal.raise_signal(number)
    assert stop.requested.is_set()
    assert said.wait(10)
    assert codes == []
    signal.raise_signal(number)
    assert codes == [128 + number]


@pytest.mark.usefixtures("_handlers")
def test_a_closed_terminal_is_ignored_where_it_was_ignored_before() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal(lambda: None, leave=lambda code: None)
    stop.install()
    signal.raise_signal(signal.SIGHUP)
    assert not stop.requested.is_set()
    stop.requested.set()
