"""`--per-gpu`: a worker process for each device of this machine, each with an identity, a lease and a task of its own.

The first signal to this process asks every worker to save its work and leave; the second kills them. A worker whose
parent is gone saves its work and leaves too.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from cbtm_common.errors import CbtmError
from cbtm_common.signals import ending_signals
from cbtm_worker.config import WorkerConfig
from cbtm_worker.display import Display, WorkerConsole
from cbtm_worker.logs import configure_logging
from cbtm_worker.signals import StopSignal

_LOOK_SECONDS = 0.2


def join_each(config: WorkerConfig, devices: Sequence[str], *, log_level: str) -> int:
    """Works on each device until all workers have left; 0 when all went well, else 1."""
    display = Display(WorkerConsole(highlight=False, soft_wrap=True, force_terminal=False))
    context = multiprocessing.get_context("spawn")
    workers: list[BaseProcess] = []
    links: list[Connection] = []
    stop = StopSignal(
        lambda: display.say("stopping all workers; press Ctrl-C again to leave at once"),
        leave=lambda code: _leave(workers, code),
    )
    stop.install()
    for device in devices:
        theirs, ours = context.Pipe(duplex=False)
        own = replace(config, device=device, name=f"{config.name} {device}")
        workers.append(context.Process(target=_work, args=(own, log_level, theirs), name=device))
        workers[-1].start()
        theirs.close()
        links.append(ours)
    asked = False
    while any(worker.is_alive() for worker in workers):
        wait([worker.sentinel for worker in workers if worker.is_alive()], _LOOK_SECONDS)
        if stop.requested.is_set() and not asked:
            asked = True
            for link in links:
                link.close()
    for worker in workers:
        if worker.exitcode is not None and worker.exitcode < 0:
            display.say(f"{worker.name}: its worker was ended by {signal.Signals(-worker.exitcode).name}")
    return int(any(worker.exitcode for worker in workers))


def _leave(workers: Sequence[BaseProcess], code: int) -> None:
    for worker in workers:
        worker.kill()
    os._exit(code)


def _work(config: WorkerConfig, log_level: str, parent: Connection) -> None:
    """One worker's process."""
    from cbtm_worker.loop import join

    for number in ending_signals():
        # A terminal's Ctrl-C comes to all; the parent passes it on, once.
        signal.signal(number, signal.SIG_IGN)
    configure_logging(log_level)
    stop = threading.Event()
    threading.Thread(target=_await_end, args=(parent, stop), name="parent", daemon=True).start()
    display = Display(WorkerConsole(highlight=False, soft_wrap=True, force_terminal=False), prefix=f"{config.device}: ")
    try:
        with display:
            join(config, stop, display)
    except CbtmError as error:
        sys.stderr.write(f"cbtm-worker: error: {config.device}: {' '.join(error.message.split())}\n")
        sys.exit(1)


def _await_end(parent: Connection, stop: threading.Event) -> None:
    """The parent sends nothing: its end is closed when it wants the workers to leave, or is gone."""
    wait([parent])
    stop.set()
