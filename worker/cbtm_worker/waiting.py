"""One event made of several: set when any of them is."""

from __future__ import annotations

import threading
import time

# A wait on several events looks at them this often.
_LOOK_SECONDS = 0.1


class AnyOf(threading.Event):
    """Read-only: whoever waits on it, or passes it on as `cancelled`, gives up as soon as one of `events` is set."""

    def __init__(self, *events: threading.Event) -> None:
        super().__init__()
        self._events = events

    def is_set(self) -> bool:
        return any(event.is_set() for event in self._events)

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it is set within `timeout` seconds."""
        end = None if timeout is None else time.monotonic() + timeout
        while not self.is_set():
            left = _LOOK_SECONDS if end is None else end - time.monotonic()
            if left <= 0:
                return False
            self._events[0].wait(min(_LOOK_SECONDS, left))
        return True
