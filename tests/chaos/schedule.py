"""Which fault comes when: a function of the seed, the duration and the rate alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    WORKER_KILL = "worker killed (-9)"
    WORKER_LOSS = "worker killed (-9), its disk lost"
    WORKER_STOP = "worker stopped for longer than a lease"
    WORKER_RESTART = "worker asked to leave, and back"
    COORDINATOR_KILL = "coordinator killed (-9)"
    COORDINATOR_STOP = "coordinator stopped for a while"
    COORDINATOR_RESTART = "coordinator drained and restarted"
    DATABASE_CRASH = "database crashed and recovered"
    STORE_STOP = "object store stopped for a while"
    STORE_FAULTS = "a time of 5xx, cut, truncated and slow transfers"
    LINK_CUT = "all connections to the coordinators cut"
    LINK_DOWN = "coordinators out of reach"
    RUN_PAUSE = "run paused and resumed by its owner"
    TASK_REQUEUE = "task put back by its owner"


# How often each comes, beside the others.
_WEIGHTS = {
    Fault.WORKER_KILL: 8,
    Fault.WORKER_LOSS: 4,
    Fault.WORKER_STOP: 4,
    Fault.WORKER_RESTART: 4,
    Fault.COORDINATOR_KILL: 5,
    Fault.COORDINATOR_STOP: 2,
    Fault.COORDINATOR_RESTART: 2,
    Fault.DATABASE_CRASH: 1,
    Fault.STORE_STOP: 2,
    Fault.STORE_FAULTS: 4,
    Fault.LINK_CUT: 4,
    Fault.LINK_DOWN: 2,
    Fault.RUN_PAUSE: 1,
    Fault.TASK_REQUEUE: 2,
}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A fault, when it comes (seconds from the start), whom it hits, and how long it lasts (seconds)."""

    at: float
    fault: Fault
    victim: int
    lasts: float


def schedule(seed: int, *, seconds: float, every: float, lease_seconds: float) -> Iterator[Planned]:
    """Faults for `seconds`, one in `every` seconds on average: one of each kind first, then at random."""
    draw = random.Random(seed)
    first: Sequence[Fault] = draw.sample(list(Fault), len(Fault))
    kinds, weights = list(_WEIGHTS), list(_WEIGHTS.values())
    at = 0.0
    for number in range(1 << 30):
        at += draw.uniform(0.5, 1.5) * every
        if at >= seconds:
            return
        fault = first[number] if number < len(first) else draw.choices(kinds, weights)[0]
        lasts = draw.uniform(1.2, 2.0) * lease_seconds if fault is Fault.WORKER_STOP else draw.uniform(0.5, 3.0)
        yield Planned(at=at, fault=fault, victim=draw.randrange(1 << 16), lasts=lasts)
