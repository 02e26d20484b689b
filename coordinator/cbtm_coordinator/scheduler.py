"""Decisions on tasks and leases: pure functions of (now, state); each returns its decision and a reason to show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from cbtm_coordinator.lifecycle import TaskKind

# A failing worker or task waits this long first, then twice as long each time.
_BACKOFF = timedelta(seconds=15)
_MAX_BACKOFF = timedelta(minutes=30)
# A lease that is renewed but shows no progress for this many lease durations is taken to be hung.
STALL_LEASES = 10
MIN_STALL = timedelta(minutes=10)
# A worker writes checkpoints by itself; one that is this many intervals late is told to.
OVERDUE_INTERVALS = 2
# An idle worker asks again within these bounds.
_POLL = (timedelta(seconds=2), timedelta(seconds=60))


class Directive(StrEnum):
    CONTINUE = "CONTINUE"
    CHECKPOINT = "CHECKPOINT"
    STOP = "STOP"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A PENDING task that a worker may take."""

    task_id: str
    run_id: str
    kind: TaskKind
    attempts: int
    committed_step: int
    total_steps: int


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided, and why."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class DirectiveDecision(Decision):
    directive: Directive


@dataclass(frozen=True, kw_only=True)
class BackoffDecision(Decision):
    until: datetime | None


def rank(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Best first: a seed (everything waits for it), then fewest failures, then the most steps left to do.

    The store's query for candidates sorts by the same key, so that the few it looks at are the best of all.
    The longest task first keeps the last worker of a run from being left alone with it.
    """
    return sorted(
        candidates,
        key=lambda c: (c.kind is not TaskKind.SEED, c.attempts, c.committed_step - c.total_steps, c.task_id),
    )


def lease_directive(
    *,
    now: datetime,
    run_paused: bool,
    training: bool,
    step: int,
    committed_step: int,
    last_checkpoint: datetime,
    interval: timedelta,
) -> DirectiveDecision:
    """What the holder of a live lease is told when it renews; a lease that is over gets LeaseLost instead.

    `last_checkpoint` is when the lease last began or committed one, or was acquired; `training` is False while the
    worker moves bytes, when another checkpoint would only queue behind them.
    """
    if run_paused:
        return DirectiveDecision(directive=Directive.STOP, reason="its owner paused the run")
    late = now - last_checkpoint
    if training and step > committed_step and late > interval * OVERDUE_INTERVALS:
        return DirectiveDecision(
            directive=Directive.CHECKPOINT,
            reason=f"no checkpoint for {int(late.total_seconds())} s, and {step - committed_step} steps at risk",
        )
    return DirectiveDecision(directive=Directive.CONTINUE, reason="")


def backoff(*, now: datetime, failures: int, what: str) -> BackoffDecision:
    """Until when to leave a task or worker alone after `failures` failures in a row."""
    if failures <= 0:
        return BackoffDecision(until=None, reason="")
    wait = min(_MAX_BACKOFF, _BACKOFF * 2 ** min(failures - 1, 10))
    seconds = int(wait.total_seconds())
    return BackoffDecision(until=now + wait, reason=f"{failures} failure(s) in a row of {what}; waits {seconds} s")


def stall_deadline(*, now: datetime, lease: timedelta) -> datetime:
    """By when a lease must show progress again (a step, or bytes moved)."""
    return now + max(MIN_STALL, lease * STALL_LEASES)


def expiry_reason(*, now: datetime, expire_time: datetime, stall_time: datetime) -> str | None:
    """Why a live lease is over, or None."""
    if expire_time <= now:
        late = int((now - expire_time).total_seconds())
        return f"not renewed in time ({late} s past its end): the worker or its link went away"
    if stall_time <= now:
        return "renewed, but without a step or a byte of progress for too long: the worker hangs"
    return None


def poll_after(*, open_tasks: int, renew: timedelta = timedelta(seconds=10)) -> timedelta:
    """When an idle worker should ask again: soon while work may come free, else seldom."""
    return max(_POLL[0], min(renew, _POLL[1])) if open_tasks else _POLL[1]
