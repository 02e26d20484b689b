"""Ctrl-C, SIGTERM and a closed terminal: the first asks the worker to leave with its work saved, the second makes it
leave at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

from cbtm_common.signals import SignalFlag, ending_signals


class StopSignal:
    """`requested` is set by the first signal; `on_first` is called on a thread of its own a moment later.

    `install` may be called in the main thread only, once. `leave` ends the process with an exit code, at once.
    """

    def __init__(self, on_first: Callable[[], None], *, leave: Callable[[int], None] = os._exit) -> None:
        self.requested = SignalFlag()
        self._on_first = on_first
        self._leave = leave

    def install(self) -> None:
        """Takes over SIGINT, SIGTERM and SIGHUP; a SIGHUP that is ignored (nohup) stays so."""
        # Started here: a handler that starts one may come in the midst of the main thread's starting another, and the
        # two would wait for each other.
        threading.Thread(target=self._tell, name="stop-message", daemon=True).start()
        for number in ending_signals():
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler: of the second signal the exit code is that of a process which the signal killed."""
        if self.requested.is_set():
            # Local state is valid at every instant: files appear by rename.
            self._leave(128 + number)
            return
        self.requested.set()

    def _tell(self) -> None:
        """Not in the handler: the main thread may be in the midst of printing, and could not print again within it."""
        self.requested.wait()
        self._on_first()
