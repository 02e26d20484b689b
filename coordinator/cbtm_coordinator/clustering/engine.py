"""Where the work on a corpus's text is done: in this machine's processes, or on a Ray cluster.

An engine changes where a function runs, never what it is given or the order of its answers, so either gives the same
bytes. What is no map over text (k-means, the SVD, writing shards) is done by the process that asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain
from typing import Protocol, TypeVar

from cbtm_coordinator.clustering.pool import in_order

S = TypeVar("S")
T = TypeVar("T")
R = TypeVar("R")


class EngineName(StrEnum):
    """What `--engine` takes."""

    LOCAL = "local"
    RAY = "ray"


class Engine(Protocol):
    """One function over pieces that come of sources."""

    def map(self, function: Callable[[T], R], sources: Iterable[S], pieces: Callable[[S], Iterable[T]]) -> Iterator[R]:
        """`function` of each of `pieces` of each of `sources`, in order. Raises what either raises.

        `function` and `pieces` are called in processes that may lie on other machines: both must pickle, as must all
        that they take and give.
        """
        ...


@dataclass(frozen=True)
class Local:
    """So many processes of this machine; sources are read by this one."""

    processes: int = 1

    def map(self, function: Callable[[T], R], sources: Iterable[S], pieces: Callable[[S], Iterable[T]]) -> Iterator[R]:
        return in_order(function, chain.from_iterable(map(pieces, sources)), processes=self.processes)


ONE_PROCESS = Local()


def open_engine(name: EngineName, *, processes: int) -> AbstractContextManager[Engine]:
    """The engine of that name; `processes` are those of the local one. Raises InvalidArgument, Unavailable."""
    if name is EngineName.LOCAL:
        return nullcontext(Local(processes))
    from cbtm_coordinator.clustering.ray_engine import open_ray

    return open_ray()
