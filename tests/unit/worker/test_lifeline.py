"""Processes that notice each other's end, though what they wait for never comes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import Connection

import psutil

from cbtm_worker.train.lifeline import end_with_parent, when_one_dies

SPAWN = multiprocessing.get_context("spawn")
PATIENCE = 30.0


def leave(code: int) -> None:
    sys.exit(code)


def sleep_with_parent(link: Connection) -> None:
    end_with_parent()
    link.send(os.getpid())
    threading.Event().wait()


def start_a_child_and_sleep(link: Connection) -> None:
    SPAWN.Process(target=sleep_with_parent, args=(link,)).start()
    threading.Event().wait()


def test_a_process_ends_with_the_one_that_started_it_even_when_that_is_killed() -> None:
    ours, theirs = SPAWN.Pipe()
    parent = SPAWN.Process(target=start_a_child_and_sleep, args=(theirs,))
    parent.start()
    assert ours.poll(PATIENCE)
    child = psutil.Process(ours.recv())
    assert child.is_running()
    assert parent.pid is not None
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    child.wait(PATIENCE)


def test_the_end_of_one_of_several_is_acted_upon_when_it_is_an_error() -> None:
    died = threading.Event()
    good, bad = (SPAWN.Process(target=leave, args=(code,)) for code in (0, 3))
    good.start()
    bad.start()
    with when_one_dies([good, bad], died.set):
        assert died.wait(PATIENCE)


def test_an_end_without_an_error_is_none() -> None:
    acts: list[int] = []
    process = SPAWN.Process(target=leave, args=(0,))
    process.start()
    with when_one_dies([process], lambda: acts.append(1)):
        process.join(PATIENCE)
    assert acts == []
    assert "lifeline" not in [thread.name for thread in threading.enumerate()]
