"""How a run stands: its tasks, who holds them, and how long it still takes."""

from __future__ import annotations

from datetime import timedelta

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_common.protos import duration, timestamp
from cbtm_common.recipe import Recipe
from cbtm_coordinator.lifecycle import TaskKind, TaskState
from cbtm_coordinator.services import convert
from cbtm_coordinator.services.context import ServiceContext
from cbtm_coordinator.store import checkpoints, identities, leases, runs, tasks
from cbtm_coordinator.store.records import LeaseRecord, RunRecord, TaskRecord

# An estimate beyond this tells nobody anything.
_MAX_REMAINING = timedelta(days=36_500)


def run_status(context: ServiceContext, request: ad.GetRunStatusRequest) -> ad.GetRunStatusResponse:
    with context.store.reading() as tx:
        run = runs.get(tx, request.run)
        found = tasks.list_tasks(tx, run.id)
        live = leases.live_leases(tx, [t.id for t in found])
        names = identities.worker_names(tx, [lease.worker_id for lease in live.values()])
        newest = checkpoints.newest_committed(tx, [t.id for t in found])
        clusters = {c.id: c for c in runs.list_clusters(tx, run, limit=run.cluster_count)}
        waiting = identities.backed_off_workers(tx, context.store.now())
    response = ad.GetRunStatusResponse(run=convert.run(run), server_time=timestamp(context.store.now()))
    for task in found:
        lease = live.get(task.id)
        status = response.tasks.add(task=convert.task(task))
        if lease is not None:
            status.lease.CopyFrom(convert.lease(lease, committed_step=task.committed_step))
            status.worker_name = names.get(lease.worker_id, "")
        if task.id in newest:
            # Without its manifest: of a thousand tasks they would not fit into a message.
            status.checkpoint.CopyFrom(convert.checkpoint(newest[task.id], files=False))
        if task.cluster_id in clusters:
            status.cluster.CopyFrom(convert.cluster(clusters[task.cluster_id], examples=False))
    response.waiting_workers.extend(convert.worker(w) for w in waiting)
    remaining = _remaining(run, found, live)
    if remaining is not None:
        response.estimated_remaining.CopyFrom(duration(remaining))
    return response


def _remaining(run: RunRecord, found: list[TaskRecord], live: dict[str, LeaseRecord]) -> timedelta | None:
    """How long the run still takes at the speed of the workers that train now; None while nobody does."""
    recipe = Recipe.from_json(run.recipe_json)
    speed = sum(lease.tokens_per_second for lease in live.values())
    if speed <= 0:
        return None
    tokens = 0
    for task in found:
        if task.state not in (TaskState.DONE, TaskState.FAILED):
            at = max(task.committed_step, live[task.id].step if task.id in live else 0)
            phase = recipe.of_task(seed=task.kind is TaskKind.SEED)
            tokens += (task.total_steps - at) * phase.step_tokens()
    seconds = tokens / speed
    return timedelta(seconds=seconds) if 0 <= seconds < _MAX_REMAINING.total_seconds() else None
