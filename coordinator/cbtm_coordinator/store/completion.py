"""Completion: accepted work becomes an expert, and takes its run to the next state."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, func, select, update

from cbtm_common.errors import InvalidState
from cbtm_common.files import strip_prefix
from cbtm_coordinator.lifecycle import TRAINING, CheckpointState, RunState, TaskKind, TaskState, sources
from cbtm_coordinator.store import credits, events, experts, runs, tasks
from cbtm_coordinator.store.records import CheckpointRecord, ExpertRecord, TaskRecord
from cbtm_coordinator.tables import checkpoints
from cbtm_coordinator.tables import tasks as tasks_table

MODEL_PREFIX = "model"


def accept(tx: Connection, now: datetime, checkpoint: CheckpointRecord) -> ExpertRecord:
    """A SUBMITTED task's final checkpoint becomes the newest version of its expert; the task is DONE.

    It counts for those who trained it.
    """
    changed = tx.execute(
        update(tasks_table)
        .where(tasks_table.c.id == checkpoint.task_id, tasks_table.c.state.in_(sources(TaskState, "accept")))
        .values(state=TaskState.DONE.value, reason="", update_time=now)
    )
    if changed.rowcount != 1:
        raise InvalidState(f"the task of checkpoint {checkpoint.id} is not SUBMITTED")
    tx.execute(
        update(checkpoints).where(checkpoints.c.id == checkpoint.id).values(state=CheckpointState.ACCEPTED.value)
    )
    task = tasks.get_task(tx, checkpoint.task_id)
    files = strip_prefix(checkpoint.files, MODEL_PREFIX)
    expert = experts.add(
        tx,
        now,
        run_id=task.run_id,
        cluster_id=task.cluster_id,
        cluster_index=task.cluster_index,
        files=files,
        checkpoint_id=checkpoint.id,
        metrics_json=checkpoint.metrics_json,
    )
    credits.earn(tx, now, task, checkpoint)
    events.append(tx, now, "task.done", run_id=task.run_id, task_id=task.id)
    _advance_run(tx, now, task)
    return expert


def _advance_run(tx: Connection, now: datetime, task: TaskRecord) -> None:
    """An accepted seed opens the experts; the last accepted expert completes the run."""
    # Locked: of two last experts accepted at once, the second must see the first, or neither completes the run.
    run = runs.get(tx, task.run_id, lock=True)
    if task.kind is TaskKind.SEED:
        tx.execute(
            update(tasks_table)
            .where(tasks_table.c.run_id == run.id, tasks_table.c.state.in_(sources(TaskState, "seed_accepted")))
            .values(state=TaskState.PENDING.value, not_before_time=now, update_time=now)
        )
        runs.change_state(tx, now, run, "seed_accepted", "")
        return
    left = tx.execute(
        select(func.count())
        .select_from(tasks_table)
        .where(
            tasks_table.c.run_id == run.id,
            tasks_table.c.kind.in_(sorted(TRAINING)),
            tasks_table.c.state != TaskState.DONE.value,
        )
    ).scalar_one()
    if left == 0 and run.state is RunState.TRAINING:
        runs.change_state(tx, now, run, "all_accepted", "")
