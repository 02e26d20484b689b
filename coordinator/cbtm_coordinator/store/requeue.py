"""Requeue: the owner opens a task again, whatever became of it."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, delete, update

from cbtm_common.errors import InvalidState
from cbtm_coordinator.lifecycle import RunState, TaskKind, TaskState, sources, transition
from cbtm_coordinator.store import checks, events, pruning, runs
from cbtm_coordinator.store.leases import revoke_leases
from cbtm_coordinator.store.records import RunRecord, TaskRecord
from cbtm_coordinator.store.tasks import get_task, list_tasks
from cbtm_coordinator.tables import tasks, unfit


def requeue_task(tx: Connection, now: datetime, run: RunRecord, task: TaskRecord, *, from_start: bool) -> TaskRecord:
    """Opens a task again with fresh attempts: from its last good checkpoint, or from step 0.

    A finished task is done anew, and its expert stays current until the new one is accepted.
    """
    if run.state in (RunState.DRAFT, RunState.CLUSTERED):
        raise InvalidState(f"run {run.name} is {run.state}: it has no tasks to requeue yet")
    if task.state is TaskState.DONE and task.kind is TaskKind.SEED:
        raise InvalidState("the seed is accepted and the experts branched from it; create a new run instead")
    if task.state in (TaskState.DONE, TaskState.SUBMITTED) and not from_start:
        raise InvalidState(f"cluster {task.cluster_index} is {task.state}; `--from-start` trains its expert anew")
    task = get_task(tx, task.id, lock=True)
    if task.state is TaskState.BLOCKED:
        raise InvalidState(f"cluster {task.cluster_index} waits for the seed; it starts by itself")
    revoke_leases(tx, now, reason="its owner put the task back", task_id=task.id)
    transition(get_task(tx, task.id).state, "requeue")
    tx.execute(
        update(tasks)
        .where(tasks.c.id == task.id, tasks.c.state.in_(sources(TaskState, "requeue")))
        .values(
            state=TaskState.PENDING.value,
            attempts=0,
            # Whoever held it before is fenced off, also a lease that expired and could still have committed late.
            epoch=tasks.c.epoch + 1,
            committed_step=0 if from_start else tasks.c.committed_step,
            not_before_time=now,
            reason="put back by its owner",
            update_time=now,
        )
    )
    tx.execute(delete(unfit).where(unfit.c.task_id == task.id))
    if from_start:
        open_checks = [check for check in checks.of_subject(tx, task.id) if not check.settled]
        checks.settle(tx, now, open_checks, "its owner started the task anew")
        pruning.drop(tx, task.id)
    events.append(tx, now, "task.requeued", run_id=run.id, task_id=task.id, detail={"from_start": from_start})
    run = runs.get(tx, run.id, lock=True)
    if run.state in (RunState.FAILED, RunState.COMPLETE):
        event = "requeue_seed" if task.kind is TaskKind.SEED else "requeue_expert"
        others = [t for t in list_tasks(tx, run.id) if t.state is TaskState.FAILED]
        if not others:
            runs.change_state(tx, now, run, event, "")
    return get_task(tx, task.id)
