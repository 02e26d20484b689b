"""Tasks: made when a run starts, counted, opened again.

An attempt is counted when a worker says that the task failed, or hangs; a machine that vanishes or is preempted does
not count, nor does what the same worker failed before (`refusals`). Attempts are counted since the last committed
checkpoint.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection, bindparam, exists, func, insert, or_, select, text, update

from cbtm_common.errors import NotFound
from cbtm_common.ids import new_id
from cbtm_common.recipe import Recipe
from cbtm_coordinator.lifecycle import TRAINING, RunState, TaskKind, TaskState, sources
from cbtm_coordinator.scheduler import backoff
from cbtm_coordinator.store import events, runs
from cbtm_coordinator.store.records import RunRecord, TaskRecord
from cbtm_coordinator.tables import runs as runs_table
from cbtm_coordinator.tables import tasks, unfit

# One failed task does not idle the volunteers of a run: the others go on, and the failed one waits for its owner.
WORKING = (RunState.SEEDING.value, RunState.TRAINING.value, RunState.FAILED.value)
# Checks first, for they are short and finished work waits for them; then a seed, for which everything waits.
PRIORITY = {TaskKind.EXPERT: 0, TaskKind.SEED: 1, TaskKind.EVALUATE: 2, TaskKind.AUDIT: 2}


def create_tasks(tx: Connection, now: datetime, run: RunRecord, *, seed_steps: int, expert_steps: int) -> None:
    """The run's tasks: a PENDING seed with BLOCKED experts, or PENDING experts."""
    recipe = Recipe.from_json(run.recipe_json)
    rows = []
    if seed_steps:
        rows.append(_new_task(now, run, TaskKind.SEED, None, -1, TaskState.PENDING, seed_steps, recipe))
    state = TaskState.BLOCKED if seed_steps else TaskState.PENDING
    rows += [
        _new_task(now, run, TaskKind.EXPERT, cluster.id, cluster.cluster_index, state, expert_steps, recipe)
        for cluster in runs.list_clusters(tx, run, limit=run.cluster_count)
    ]
    tx.execute(insert(tasks), rows)
    for row in rows:
        events.append(tx, now, f"task.{row['state'].lower()}", run_id=run.id, task_id=row["id"])
    if tx.dialect.name == "postgresql":
        # Until it knows of them, PostgreSQL would sort all open tasks for each claim, and not follow the index.
        tx.execute(text("ANALYZE runs, tasks"))


def _new_task(
    now: datetime,
    run: RunRecord,
    kind: TaskKind,
    cluster_id: str | None,
    cluster_index: int,
    state: TaskState,
    steps: int,
    recipe: Recipe,
) -> dict[str, Any]:
    return {
        "id": new_id("task"),
        "run_id": run.id,
        "kind": kind.value,
        "priority": PRIORITY[kind],
        "cluster_id": cluster_id,
        "cluster_index": cluster_index,
        "state": state.value,
        "total_steps": steps,
        "max_attempts": recipe.lease.max_attempts,
        "not_before_time": now,
        "create_time": now,
        "update_time": now,
    }


_BY_ID = select(tasks).where(tasks.c.id == bindparam("of_task"))
_LOCKED_BY_ID = _BY_ID.with_for_update(key_share=True)


def get_task(tx: Connection, task_id: str, *, lock: bool = False) -> TaskRecord:
    """`lock` holds its row to the transaction's end: nobody claims it meanwhile."""
    row = tx.execute(_LOCKED_BY_ID if lock else _BY_ID, {"of_task": task_id}).one_or_none()
    if row is None:
        raise NotFound(f"there is no task {task_id}")
    return TaskRecord.of(row)


def list_tasks(tx: Connection, run_id: str) -> list[TaskRecord]:
    """Those that train: the seed first, then by cluster index."""
    query = (
        select(tasks)
        .where(tasks.c.run_id == run_id, tasks.c.kind.in_(sorted(TRAINING)))
        .order_by(tasks.c.cluster_index)
    )
    return [TaskRecord.of(row) for row in tx.execute(query)]


def task_of(tx: Connection, run: RunRecord, cluster_index: int) -> TaskRecord:
    """The task that trains a cluster's expert, or the seed (-1)."""
    where = tasks.c.run_id == run.id, tasks.c.cluster_index == cluster_index, tasks.c.kind.in_(sorted(TRAINING))
    row = tx.execute(select(tasks).where(*where)).one_or_none()
    if row is None:
        what = "no seed task" if cluster_index < 0 else f"no cluster {cluster_index}"
        raise NotFound(f"run {run.name} has {what}; `cbtm-coord status {run.name}` shows its tasks")
    return TaskRecord.of(row)


def count_open(tx: Connection, *, run_id: str | None = None, worker_id: str = "") -> int:
    """Tasks that are not finished and may come free without their owner; for a worker, only those it is fit for."""
    query = (
        select(func.count())
        .select_from(tasks.join(runs_table, runs_table.c.id == tasks.c.run_id))
        .where(
            tasks.c.state.in_([s.value for s in TaskState if s not in (TaskState.DONE, TaskState.FAILED)]),
            # Behind a failed seed the experts wait for the owner.
            or_(tasks.c.state != TaskState.BLOCKED.value, runs_table.c.state != RunState.FAILED.value),
            runs_table.c.state.in_(WORKING),
            ~exists().where(
                unfit.c.worker_id == worker_id, unfit.c.task_id == tasks.c.id, unfit.c.until_time.is_(None)
            ),
        )
    )
    if run_id is not None:
        query = query.where(tasks.c.run_id == run_id)
    return int(tx.execute(query).scalar_one())


_REOPEN = (
    update(tasks)
    .where(
        tasks.c.id == bindparam("of_task"),
        tasks.c.epoch == bindparam("of_epoch"),
        tasks.c.state.in_(bindparam("of_states", expanding=True)),
    )
    .values(
        state=bindparam("new_state"),
        attempts=bindparam("new_attempts"),
        not_before_time=bindparam("new_not_before_time"),
        reason=bindparam("new_reason"),
        update_time=bindparam("new_update_time"),
    )
    .returning(tasks)
)


def reopen(tx: Connection, now: datetime, task: TaskRecord, *, event: str, reason: str, counts: bool) -> TaskRecord:
    """A leased task back to PENDING, from its last good checkpoint; or to FAILED when its attempts are used up.

    The task as it is then; unchanged when another process was first.
    """
    attempts = task.attempts + (1 if counts else 0)
    failed = attempts >= task.max_attempts
    wait = backoff(now=now, failures=attempts if counts else 0, what="this task")
    row = tx.execute(
        _REOPEN,
        {
            "of_task": task.id,
            "of_epoch": task.epoch,
            "of_states": sources(TaskState, event),
            "new_state": (TaskState.FAILED if failed else TaskState.PENDING).value,
            "new_attempts": attempts,
            "new_not_before_time": wait.until or now,
            "new_reason": reason,
            "new_update_time": now,
        },
    ).one_or_none()
    if row is None:
        return get_task(tx, task.id)
    kind = "task.failed" if failed else "task.pending"
    events.append(tx, now, kind, run_id=task.run_id, task_id=task.id, reason=reason, detail={"attempts": attempts})
    # A check that nobody can do is another's to do (`acceptance`).
    if failed and task.kind in TRAINING:
        run = runs.get(tx, task.run_id, lock=True)
        if run.state in (RunState.SEEDING, RunState.TRAINING):
            why = f"cluster {task.cluster_index}" if task.kind is TaskKind.EXPERT else "the seed"
            runs.change_state(tx, now, run, "task_failed", f"{why} failed {attempts} times, last: {reason}")
    return TaskRecord.of(row)
