"""Which signals end a process, and a flag that a signal handler sets and threads wait for.

A handler runs in the main thread, between any two of its instructions. `threading.Event.set` takes a lock there that
the main thread may hold at that moment, in `wait`; then neither goes on. And a signal that comes in the instant before
a thread blocks on a lock is noticed only when something else wakes it. So this flag has no lock; waiting is looking.
"""

from __future__ import annotations

import signal
import threading
import time

# A signal waits for so long at most; a waiter that nobody needs costs nothing to speak of.
_LOOK_SECONDS = 0.1


def ending_signals() -> list[signal.Signals]:
    """What asks a process to end: Ctrl-C, SIGTERM and a closed terminal, unless that is ignored, as nohup does."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


class SignalFlag(threading.Event):
    """An event without a lock: `set` may be called by a signal handler, at any time."""

    def __init__(self) -> None:
        super().__init__()
        self._is_up = False

    def is_set(self) -> bool:
        return self._is_up

    def set(self) -> None:
        self._is_up = True

    def clear(self) -> None:
        self._is_up = False

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it is set within `timeout` seconds; as long as it takes without."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self._is_up:
            left = _LOOK_SECONDS if end is None else end - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(_LOOK_SECONDS, left))
        return True
