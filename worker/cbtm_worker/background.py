"""Makes a thread give way to training."""

from __future__ import annotations

import logging
import os
import sys
import threading

_log = logging.getLogger(__name__)
# About a tenth of a core against a thread that trains on it; all of a core that nobody wants.
_NICE = 10


def give_way() -> None:
    """Lowers the priority of the calling thread, and of those that it starts. On Linux; elsewhere nothing changes.

    A thread that hashes or sends a checkpoint takes a core from training on a CPU, whose threads then all wait for the
    one that lost it; it has a whole checkpoint interval for its work. Not for the heartbeat: that must be in time.
    """
    if sys.platform != "linux":
        return
    try:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
    except OSError as error:
        _log.debug("the priority of %s stays: %s", threading.current_thread().name, error)
