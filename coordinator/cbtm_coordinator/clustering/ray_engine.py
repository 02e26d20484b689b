"""The engine on Ray Data: sources are read, and pieces worked on, wherever the cluster has room.

`RAY_ADDRESS`, or a Ray that runs on this machine, says which cluster; without either, one is started here for as long
as the engine is open. Every node needs the same cbtm installed, and the corpus under the same paths. Answers stream to
this process in order, and Ray holds back what is ahead of them. Ray runs a piece anew when its node is lost.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from cbtm_common.errors import InvalidArgument, Unavailable
from cbtm_coordinator.clustering.pool import use_one_core

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")

# Of a core: text is read many times faster than it is tokenized. It also keeps Ray from fusing both into one task.
_READING_CORES = 0.25
# Of pieces in one task: worth loading a router and a tokenizer for, and small enough for one file to feed many tasks.
_BLOCK_BYTES = 32 << 20


@contextmanager
def open_ray() -> Iterator[RayEngine]:
    """Raises InvalidArgument when Ray is not installed, Unavailable when its cluster cannot be reached."""
    # Ray sends statistics of its use to its makers unless told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise InvalidArgument(
            "engine: ray is not installed: pip install 'cbtm[coordinator,ray]', or use --engine local", field="engine"
        ) from error
    ours = not ray.is_initialized()
    if ours:
        _start(ray)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        yield RayEngine()
    finally:
        if ours:
            ray.shutdown()


def _start(ray: Any) -> None:
    """Joins a cluster, or starts one. Ray gives some of its own processes 30 s, which a busy machine's first start can
    exceed: hundreds of megabytes are read from disk. The next finds them in memory."""
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")
    for last in (False, True):
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
            return
        except Exception as error:
            ray.shutdown()
            # There is no cluster where one was said to be.
            if last or isinstance(error, ConnectionError):
                raise Unavailable(f"engine: no Ray cluster can be used: {error}") from error


class RayEngine:
    """See `Engine`. One dataset a map."""

    def map(self, function: Callable[[T], R], sources: Iterable[S], pieces: Callable[[S], Iterable[T]]) -> Iterator[R]:
        import ray

        rows = [{"source": pickle.dumps(source)} for source in sources]
        if not rows:
            return
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        context.target_max_block_size = _BLOCK_BYTES
        dataset = (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            .flat_map(_Reader(pieces), num_cpus=_READING_CORES)
            .map(_Worker(function), num_cpus=1)
        )
        try:
            for row in dataset.iter_rows():
                yield _opened(row["answer"])
        except ray.exceptions.RayError as error:
            first = str(error).strip().partition("\n")[0]
            raise Unavailable(
                f"engine: Ray gave up ({first}); see its logs, and whether its nodes have this cbtm and enough memory"
            ) from error


class _Reader:
    """A source's row to a row for each piece. An error is an answer: Ray would rewrite it."""

    def __init__(self, pieces: Callable[[Any], Iterable[Any]]) -> None:
        self._pieces = pieces

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, bytes]]:
        try:
            for piece in self._pieces(pickle.loads(row["source"])):  # noqa: S301 - its own processes wrote it
                yield {"piece": pickle.dumps((piece, None))}
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where the answers are read
            yield {"piece": pickle.dumps((None, error))}


class _Worker:
    """A piece's row to its answer's. A copy is made in each task."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function
        self._begun = False

    def __call__(self, row: dict[str, Any]) -> dict[str, bytes]:
        if not self._begun:
            use_one_core()
            self._begun = True
        piece, error = pickle.loads(row["piece"])  # noqa: S301 - its own processes wrote it
        if error is not None:
            return {"answer": pickle.dumps((None, error))}
        try:
            return {"answer": pickle.dumps((self._function(piece), None))}
        except Exception as raised:  # noqa: BLE001 - as above
            return {"answer": pickle.dumps((None, raised))}


def _opened(answer: bytes) -> Any:
    value, error = pickle.loads(answer)  # noqa: S301 - its own processes wrote it
    if error is not None:
        raise error
    return value
