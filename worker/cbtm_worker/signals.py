"""Ctrl-C and SIGTERM: the first asks the worker to leave with its work saved, the second makes it leave at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType


class StopSignal:
    """Set by the first signal. `install` may be called in the main thread only."""

    def __init__(self, on_first: Callable[[], None]) -> None:
        self.requested = threading.Event()
        self._on_first = on_first

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested.is_set():
            # Local state is valid at every instant: files appear by rename.
            os._exit(128 + number)
        self.requested.set()
        self._on_first()
