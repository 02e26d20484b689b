"""Whose work a checkpoint is made of: the commits behind it, each with the worker that trained up to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, select

from cbtm_coordinator.lifecycle import CheckpointState
from cbtm_coordinator.tables import checkpoints, leases, workers


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Steps from `from_step` to `to_step` of a task, trained by one worker and committed as one checkpoint."""

    checkpoint_id: str
    state: CheckpointState
    epoch: int
    from_step: int
    to_step: int
    worker_id: str
    account_id: str


def lineage(tx: Connection, task_id: str, *, epoch: int, step: int) -> list[Segment]:
    """What the task's commit at `epoch` and `step` is made of, in the order of training; those since pruned included.

    A task that was started anew has commits of its earlier lives: an older commit at a later step is none of these.
    """
    rows = tx.execute(
        select(checkpoints, leases.c.worker_id, workers.c.account_id)
        .join(leases, leases.c.id == checkpoints.c.lease_id)
        .join(workers, workers.c.id == leases.c.worker_id)
        .where(
            checkpoints.c.task_id == task_id,
            checkpoints.c.commit_time.is_not(None),
            checkpoints.c.state != CheckpointState.REJECTED.value,
            checkpoints.c.epoch <= epoch,
            checkpoints.c.step <= step,
        )
        .order_by(checkpoints.c.epoch.desc(), checkpoints.c.step.desc())
    ).all()
    chain: list[Row[Any]] = []
    for row in rows:
        if chain and row.step >= chain[-1].step:
            break
        chain.append(row)
    chain.reverse()
    starts = [0, *(row.step for row in chain)]
    return [
        Segment(
            checkpoint_id=row.id,
            state=CheckpointState(row.state),
            epoch=row.epoch,
            from_step=start,
            to_step=row.step,
            worker_id=row.worker_id,
            account_id=row.account_id,
        )
        for start, row in zip(starts, chain, strict=False)
    ]


def clean_step(segments: Sequence[Segment], account_ids: frozenset[str]) -> int:
    """The last step that can be gone on from without the work of these accounts: a commit still held, or 0."""
    clean = 0
    for segment in segments:
        if segment.account_id in account_ids:
            break
        if segment.state is CheckpointState.COMMITTED:
            clean = segment.to_step
    return clean
