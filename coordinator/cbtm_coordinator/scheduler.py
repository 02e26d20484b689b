"""Decisions on tasks and leases: pure functions of (now, state); each returns its decision and a reason to show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from cbtm_common.recipe import LeaseRecipe

# A failing worker or task waits this long first, then twice as long each time.
_BACKOFF = timedelta(seconds=15)
_MAX_BACKOFF = timedelta(minutes=30)
# A lease outlives so many renewals that fail, at the pace of the slowest one seen.
_LEASE_RENEWALS = 3
# An upload of hours is worth waiting for longer than a lost minute: this share of it.
_LEASE_OF_UPLOAD = 0.05
# Sending takes half of the time at most.
_CHECKPOINT_UPLOADS = 2
# What a checkpoint puts at risk is some steps, not one.
_CHECKPOINT_STEPS = 4
# So many times the longest step seen is no step that takes long any more.
_STALL_STEPS = 10
# A store that keeps no digests is read back, after the last byte has moved; at this speed, in bytes a second.
_READ_BACK_SPEED = 25e6
# A worker writes checkpoints by itself; one that is this many intervals late is told to.
OVERDUE_INTERVALS = 2
# An idle worker asks again within these bounds.
_POLL = (timedelta(seconds=2), timedelta(seconds=60))


class Directive(StrEnum):
    CONTINUE = "CONTINUE"
    CHECKPOINT = "CHECKPOINT"
    STOP = "STOP"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was decided, and why."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a worker measured of itself; 0 where it has not yet. Said by the worker, so only bounds make it safe."""

    step_seconds: float = 0.0
    upload_bytes_per_second: float = 0.0
    checkpoint_bytes: int = 0
    # Of the last renewal.
    renew_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Pace(Decision):
    """How long a lease holds unrenewed, how often a checkpoint is due, and how long a lease may show no progress.

    `reason` is empty when all three are what the recipe begins with.
    """

    lease: timedelta
    checkpoint: timedelta
    patience: timedelta


@dataclass(frozen=True, kw_only=True)
class DirectiveDecision(Decision):
    directive: Directive
    pace: Pace


@dataclass(frozen=True, kw_only=True)
class BackoffDecision(Decision):
    until: datetime | None


def pace(bounds: LeaseRecipe, measured: Measured) -> Pace:
    """Sizes a lease by its worker's speed, from what the run begins with up to what it allows.

    A slow link gets longer leases and fewer checkpoints, a slow device fewer checkpoints and more patience. Whatever a
    worker says of itself, the bounds hold.
    """
    step = _sane(measured.step_seconds)
    renewal = _sane(measured.renew_seconds)
    size = _sane(measured.checkpoint_bytes)
    speed = _sane(measured.upload_bytes_per_second)
    upload = size / speed if speed else 0.0
    lease = _within(
        bounds.lease_seconds,
        max(_LEASE_RENEWALS * (bounds.renew_seconds + renewal) if renewal else 0.0, _LEASE_OF_UPLOAD * upload),
        bounds.max_lease_seconds,
    )
    checkpoint = _within(
        bounds.checkpoint_seconds,
        max(_CHECKPOINT_UPLOADS * upload, _CHECKPOINT_STEPS * step),
        bounds.max_checkpoint_seconds,
    )
    patience = _within(
        bounds.stall_seconds, max(_STALL_STEPS * step, size / _READ_BACK_SPEED), bounds.max_stall_seconds
    )
    reasons = []
    if (lease, checkpoint, patience) != (bounds.lease_seconds, bounds.checkpoint_seconds, bounds.stall_seconds):
        if upload:
            reasons.append(f"a checkpoint of {size / 1e9:.2g} GB takes {upload:.0f} s to send")
        if step:
            reasons.append(f"a step takes {step:.2g} s")
        if renewal:
            reasons.append(f"a renewal took {renewal:.2g} s")
    return Pace(
        lease=timedelta(seconds=lease),
        checkpoint=timedelta(seconds=checkpoint),
        patience=timedelta(seconds=patience),
        reason=", ".join(reasons),
    )


def _sane(number: float) -> float:
    return float(number) if 0 < number < math.inf else 0.0


def _within(least: float, wanted: float, most: float) -> float:
    return max(least, min(wanted, most))


def lease_directive(
    *,
    now: datetime,
    run_paused: bool,
    training: bool,
    step: int,
    committed_step: int,
    last_checkpoint: datetime,
    pace: Pace,
) -> DirectiveDecision:
    """What the holder of a live lease is told when it renews; a lease that is over gets LeaseLost instead.

    `last_checkpoint` is when the lease last began or committed one, or was acquired; `training` is False while the
    worker moves bytes, when another checkpoint would only queue behind them.
    """
    if run_paused:
        return DirectiveDecision(directive=Directive.STOP, reason="its owner paused the run", pace=pace)
    late = now - last_checkpoint
    if training and step > committed_step and late > pace.checkpoint * OVERDUE_INTERVALS:
        return DirectiveDecision(
            directive=Directive.CHECKPOINT,
            reason=f"no checkpoint for {int(late.total_seconds())} s, and {step - committed_step} steps at risk",
            pace=pace,
        )
    return DirectiveDecision(directive=Directive.CONTINUE, reason="", pace=pace)


def backoff(*, now: datetime, failures: int, what: str) -> BackoffDecision:
    """Until when to leave a task or worker alone after `failures` failures in a row."""
    if failures <= 0:
        return BackoffDecision(until=None, reason="")
    wait = min(_MAX_BACKOFF, _BACKOFF * 2 ** min(failures - 1, 10))
    seconds = int(wait.total_seconds())
    return BackoffDecision(until=now + wait, reason=f"{failures} failure(s) in a row of {what}; waits {seconds} s")


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
