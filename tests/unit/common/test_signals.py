"""A flag that a signal handler may set while the main thread waits for it."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from cbtm_common.signals import SignalFlag


def test_it_is_seen_by_who_waits_and_by_who_comes_later() -> None:
    flag = SignalFlag()
    assert not flag.wait(0.001)
    threading.Thread(target=flag.set).start()
    assert flag.wait()
    assert flag.is_set()
    flag.clear()
    assert not flag.is_set()


def test_a_signal_sets_it_while_the_main_thread_waits() -> None:
    flag = SignalFlag()
    before = signal.signal(signal.SIGALRM, lambda number, frame: flag.set())
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    started = time.monotonic()
    assert flag.wait(20)
    assert time.monotonic() - started < 10
    signal.signal(signal.SIGALRM, before)


@pytest.mark.timeout(20)
def test_a_signal_that_comes_inside_of_a_wait_does_not_wait_for_it() -> None:
    flag = SignalFlag()
    # What the main thread holds for a moment whenever it waits for a plain event.
    with flag._cond:  # type: ignore[attr-defined]
        flag.set()
    assert flag.is_set()
