"""One function over a stream of pieces, on several processes: answers come in the order of the pieces.

What is computed does not depend on the number of processes, as pieces are cut before they are handed out. Memory holds
a few pieces for each process. Workers end when the process that started them does, however that ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

from cbtm_common.errors import ResourceExhausted

T = TypeVar("T")
R = TypeVar("R")

# Pieces handed out for each process: one that it works on, and the next.
_AHEAD = 2


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(function: Callable[[T], R], pieces: Iterable[T], *, processes: int) -> Iterator[R]:
    """`function` of each piece. One process is this one; more are started, and `function` is pickled to each once.

    Raises what `function` raises, and ResourceExhausted when a worker is killed, which is what the kernel does when
    memory runs out.
    """
    if processes <= 1:
        yield from map(function, pieces)
        return
    # Forking would copy the threads' locks of gRPC and of the tokenizer as they happen to be.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(function,)) as executor:
        waiting: deque[Future[Any]] = deque()
        try:
            for piece in pieces:
                waiting.append(executor.submit(_call, piece))
                if len(waiting) >= _AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise ResourceExhausted(
                "memory: a worker process of the clustering was killed, as happens when memory runs out; free some, or "
                "let it use fewer cores (taskset)"
            ) from error
        finally:
            executor.shutdown(wait=False, cancel_futures=True)


def use_one_core() -> None:
    """In a process of many: tokenizer and BLAS would otherwise start a thread for every core in each."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threadpool_limits(1, user_api="blas")


_function: Callable[[Any], Any]


def _begin(function: Callable[[Any], Any]) -> None:
    """In a worker, before its first piece."""
    global _function
    _function = function
    # Ctrl-C is the parent's to answer, which ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    use_one_core()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(piece: Any) -> Any:
    return _function(piece)
