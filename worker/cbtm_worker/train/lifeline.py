"""The processes of a group notice each other's end, also while they wait for a device that would wait for ever."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

_REAP_SECONDS = 0.01


def end_with_parent() -> None:
    """From now on, this process ends at once when the one that started it does, however that ended."""
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("only a process that multiprocessing started has a parent to end with")
    threading.Thread(target=_end_after, args=(parent.sentinel,), name="lifeline", daemon=True).start()


@contextmanager
def when_one_dies(processes: Sequence[BaseProcess], act: Callable[[], None]) -> Iterator[None]:
    """Within it, `act` is called on a thread of its own, once, when one of `processes` ends with an error."""
    stopped, stop = multiprocessing.Pipe(duplex=False)

    def watch() -> None:
        alive = {process.sentinel: process for process in processes}
        while alive:
            for ended in wait([stopped, *alive]):
                if not isinstance(ended, int):
                    return
                process = alive.pop(ended)
                while process.exitcode is None:
                    # Another thread is just reaping it.
                    time.sleep(_REAP_SECONDS)
                if process.exitcode != 0:
                    act()
                    return

    thread = threading.Thread(target=watch, name="lifeline", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.close()
        thread.join()
        stopped.close()


def _end_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
