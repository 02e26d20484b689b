"""Assignment: a worker that asks is given a task, with all that it needs to begin, or told when to ask again."""

from __future__ import annotations

from datetime import timedelta

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.faults import point
from cbtm_common.protos import duration
from cbtm_coordinator.lifecycle import CHECKING, TRAINING, TaskKind
from cbtm_coordinator.scheduler import poll_after
from cbtm_coordinator.services import checks as check_service
from cbtm_coordinator.services import convert
from cbtm_coordinator.services.auth import caller, check_current
from cbtm_coordinator.services.context import ServiceContext
from cbtm_coordinator.services.task_inputs import TaskInputs
from cbtm_coordinator.store import Connection, checkpoints, checks, identities, leases, runs, tasks

_QUOTA_RETRY = timedelta(seconds=30)


def acquire(context: ServiceContext, inputs: TaskInputs, request: ws.AcquireLeaseRequest) -> ws.AcquireLeaseResponse:
    worker_id = caller.get().id
    hardware = convert.hardware_json(request.hardware) if request.HasField("hardware") else ""
    # A worker that names none is older than the others.
    kinds = {TaskKind(pb.TaskKind.Name(k).removeprefix("TASK_KIND_")) for k in request.kinds if k} or TRAINING

    def answer(tx: Connection) -> ws.AcquireLeaseResponse:
        now = context.store.now()
        run_id = runs.get(tx, request.run).id if request.run else None
        worker = identities.seen(tx, now, worker_id, hardware_json=hardware)
        check_current(worker, caller.get())
        if worker.not_before_time is not None and worker.not_before_time > now:
            return ws.AcquireLeaseResponse(retry_after=duration(worker.not_before_time - now), reason=worker.reason)
        quota = context.quotas.leases
        if quota and leases.count_live(tx, worker_id) >= quota:
            reason = f"this worker holds {quota} leases, the most it may; they end unless they are renewed"
            return ws.AcquireLeaseResponse(retry_after=duration(_QUOTA_RETRY), reason=reason)
        claimed = leases.acquire(
            tx,
            now,
            worker_id,
            run_id=run_id,
            account_id=worker.account_id,
            trusted=worker.trusted,
            kinds=kinds,
        )
        if claimed is None:
            return _nothing(tx, run_id)
        point("coordinator.acquire.before_commit")
        return ws.AcquireLeaseResponse(lease=convert.lease(claimed.lease), spec=_spec(tx, inputs, claimed))

    response = context.once(request, ws.AcquireLeaseResponse, answer, keep=lambda r: r.HasField("lease"))
    point("coordinator.acquire.after_commit")
    return response


def _nothing(tx: Connection, run_id: str | None) -> ws.AcquireLeaseResponse:
    open_tasks = tasks.count_open(tx, run_id=run_id, worker_id=caller.get().id)
    reason = f"{open_tasks} task(s) are taken or not open yet" if open_tasks else "there is no work left"
    return ws.AcquireLeaseResponse(
        retry_after=duration(poll_after(open_tasks=open_tasks)), reason=reason, idle=not open_tasks
    )


def _spec(tx: Connection, inputs: TaskInputs, claim: leases.Claim) -> ws.TaskSpec:
    run, task = claim.run, claim.task
    check = checks.get(tx, task.id) if task.kind in CHECKING else None
    subject = task if check is None else tasks.get_task(tx, check.subject_id)
    policy = leases.lease_policy(run.recipe_json)
    resume = checkpoints.latest_good(tx, task) if check is None else check_service.begins_at(tx, check)
    return ws.TaskSpec(
        task=convert.task(task),
        run=convert.run(run),
        policy=pb.LeasePolicy(
            lease_duration=duration(policy.lease_seconds),
            renew_interval=duration(policy.renew_seconds),
            checkpoint_interval=duration(policy.checkpoint_seconds),
        ),
        base_model_files=[f.to_proto() for f in inputs.base_model(tx, run, subject)],
        tokenizer_files=[f.to_proto() for f in inputs.tokenizer(tx, run)],
        resume_from=convert.checkpoint(resume) if resume else None,
        check=None if check is None else check_service.describe(tx, run, check),
    )
