"""From reports to what follows: a submitted model is accepted, or work is rejected and its worker answers for it.

`after_commit` opens the checks of a commit; `decide` is called with every report, and whenever a check failed. Both in
the transaction of what they follow from; decisions are `cbtm_coordinator.verification`, undoing is `rollback`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TypeVar

from sqlalchemy import Connection, select, update

from cbtm_common.recipe import Recipe
from cbtm_coordinator.lifecycle import TaskKind, TaskState, Verification
from cbtm_coordinator.store import (
    checkpoints,
    checks,
    completion,
    eligibility,
    events,
    experts,
    identities,
    rollback,
    runs,
)
from cbtm_coordinator.store.records import CheckpointRecord, CheckRecord, RunRecord, TaskRecord, WorkerRecord
from cbtm_coordinator.store.tasks import get_task
from cbtm_coordinator.structure.movement import moved_from_json
from cbtm_coordinator.tables import leases, workers
from cbtm_coordinator.tables import tasks as tasks_table
from cbtm_coordinator.verification.audits import Computation, Finding, Replay, compare, wants_audit
from cbtm_coordinator.verification.evaluation import Evaluation, History, Outcome, Verdict, judge
from cbtm_coordinator.verification.quorum import REPLICAS, Next, Report, Settlement, settle, settle_audits

_Content = TypeVar("_Content")
_GAIN, _CANARY_RISE = "held_out_gain", "canary_rise"


def after_commit(
    tx: Connection, now: datetime, checkpoint: CheckpointRecord, task: TaskRecord, *, draw: Callable[[], float]
) -> None:
    """Opens the checks that a commit calls for. `draw` gives numbers of [0, 1)."""
    run = runs.get_by_id(tx, task.run_id)
    if run.verification is Verification.OFF or checks.are_open_for(tx, checkpoint.id):
        return
    worker = _worker_of(tx, checkpoint)
    if worker.trusted:
        return
    _, steps = checks.segment(tx, task, checkpoint)
    decision = wants_audit(worker.trust, draw(), at_risk=worker.at_risk, share=steps / task.total_steps)
    knows_answers = task.cluster_id is not None and eligibility.sees_held_out(tx, worker.account_id, task.cluster_id)
    identities.set_at_risk(tx, worker.id, 0.0 if knows_answers else decision.at_risk)
    if decision.audit or knows_answers:
        checks.open_audit(tx, now, task, checkpoint, worker)
    if task.state is TaskState.SUBMITTED:
        cluster_id = _cluster_to_judge_on(tx, run, task)
        by = "a trusted worker" if run.verification is Verification.TRUSTED else "workers of other accounts"
        waits = update(tasks_table).where(tasks_table.c.id == task.id)
        tx.execute(waits.values(reason=f"handed in; waits to be checked by {by}"))
        for _ in range(1 if run.verification is Verification.TRUSTED else REPLICAS):
            checks.open_evaluation(tx, now, task, checkpoint, worker, cluster_id)


def decide(tx: Connection, now: datetime, subject_id: str) -> None:
    """Does what the reports on a task's work call for. Without news, nothing changes."""
    liars: list[_Liar] = []
    _decide(tx, now, subject_id, liars)
    # After all else: who is shut out may have trained on the same task.
    for liar in liars:
        rollback.strike(tx, now, get_task(tx, subject_id), worker_id=liar.worker_id, reason=liar.reason)


def _decide(tx: Connection, now: datetime, subject_id: str, liars: list[_Liar]) -> None:
    task = get_task(tx, subject_id, lock=True)
    run = runs.get_by_id(tx, task.run_id)
    found = [check for check in checks.of_subject(tx, task.id) if check.kind is TaskKind.AUDIT]
    for checkpoint_id in dict.fromkeys(check.checkpoint_id for check in found if not check.settled):
        group = [check for check in found if check.checkpoint_id == checkpoint_id]
        if _decide_audit(tx, now, run, task, group, liars) is Outcome.FAILED:
            return
    if task.state is TaskState.SUBMITTED:
        _decide_submitted(tx, now, run, task, liars)


def set_verification(tx: Connection, now: datetime, run: RunRecord, verification: Verification) -> RunRecord:
    """Who checks from now on. With OFF, what waits to be checked is accepted."""
    changed = runs.set_verification(tx, now, run, verification)
    if verification is not Verification.OFF:
        return changed
    query = select(tasks_table.c.id).where(
        tasks_table.c.run_id == run.id, tasks_table.c.state == TaskState.SUBMITTED.value
    )
    for task_id in tx.execute(query).scalars().all():
        task = get_task(tx, task_id, lock=True)
        checks.settle(tx, now, checks.of_subject(tx, task.id), "its owner turned verification off")
        completion.accept(tx, now, checkpoints.submitted(tx, task))
    return runs.get(tx, run.id)


# Audits


def _decide_audit(
    tx: Connection,
    now: datetime,
    run: RunRecord,
    task: TaskRecord,
    group: Sequence[CheckRecord],
    liars: list[_Liar],
) -> Outcome:
    """UNSURE while more must be asked, and when nobody can tell. When FAILED, the work is rejected."""
    check, checkpoint = group[0], checkpoints.get(tx, group[0].checkpoint_id)
    dropout = Recipe.from_json(run.recipe_json).dropout != 0.0
    original = Computation.of(json.loads(checkpoint.metrics_json or "{}"))

    def finding(check: CheckRecord) -> Finding:
        return compare(_replay(check), original, dropout=dropout)

    settled = settle_audits(
        _reports(tx, group, finding),
        others=eligibility.others(tx, now, run, check, task.cluster_id),
        failures=_failures(group),
    )
    if settled.next in (Next.ASK, Next.CONFIRM):
        if not _asks(tx, now, group):
            worker = identities.get_worker(tx, check.worker_id)
            checks.open_audit(tx, now, task, checkpoint, worker, confirms=settled.next is Next.CONFIRM)
        return Outcome.UNSURE
    checks.settle(tx, now, group, settled.reason)
    _note_dissent(tx, now, task, settled, liars)
    about = {"checkpoint_id": checkpoint.id, "step": checkpoint.step, "reports": settled.reason}
    if settled.speaker is None:
        _note(tx, now, "audit.undecided", task, check.worker_id, settled.reason, about)
        return Outcome.UNSURE
    found = settled.speaker.content
    evidence = {**about, **found.evidence}
    if found.outcome is Outcome.FAILED:
        _note(tx, now, "audit.failed", task, check.worker_id, found.reason, evidence)
        rollback.reject(tx, now, task, worker_id=check.worker_id, reason=found.reason, is_proven=settled.convicts)
        return Outcome.FAILED
    identities.change_standing(tx, check.worker_id, lambda standing: standing.after_pass())
    _note(tx, now, "audit.passed", task, check.worker_id, found.reason, evidence)
    return Outcome.PASSED


# Submitted models


@dataclass(frozen=True, kw_only=True)
class _Judged:
    evaluation: Evaluation
    verdict: Verdict


def _decide_submitted(tx: Connection, now: datetime, run: RunRecord, task: TaskRecord, liars: list[_Liar]) -> None:
    checkpoint = checkpoints.submitted(tx, task)
    found = checks.of_subject(tx, task.id)
    group = [c for c in found if c.kind is TaskKind.EVALUATE and c.checkpoint_id == checkpoint.id]
    check = group[0]
    worker = identities.get_worker(tx, check.worker_id)
    cluster_id = get_task(tx, check.task_id).cluster_id
    recipe, history = Recipe.from_json(run.recipe_json), _history(tx, run, task)

    def judged(check: CheckRecord) -> _Judged:
        evaluation = Evaluation.of(json.loads(check.report_json))
        verdict = judge(
            evaluation,
            history,
            claimed_loss=_number(json.loads(checkpoint.metrics_json or "{}").get("loss")),
            batch_sequences=recipe.of_task(seed=task.kind is TaskKind.SEED).global_batch,
        )
        return _Judged(evaluation=evaluation, verdict=verdict)

    settled = settle(
        _reports(tx, group, judged),
        lambda a, b: a.evaluation.agrees_with(b.evaluation),
        lambda found: found.verdict.outcome is Outcome.FAILED,
        others=eligibility.others(tx, now, run, check, cluster_id),
        failures=_failures(group),
    )
    if settled.next in (Next.ASK, Next.CONFIRM):
        if not _asks(tx, now, group):
            assert cluster_id is not None
            confirms = settled.next is Next.CONFIRM
            checks.open_evaluation(tx, now, task, checkpoint, worker, cluster_id, confirms=confirms)
        return
    if any(not c.settled for c in group):
        checks.settle(tx, now, group, settled.reason)
        _note_dissent(tx, now, task, settled, liars)
    if settled.speaker is None:
        _note(tx, now, "evaluation.undecided", task, check.worker_id, settled.reason, {})
        rollback.reject(tx, now, task, worker_id=check.worker_id, reason=settled.reason, is_proven=False)
        return
    evaluation, verdict = settled.speaker.content.evaluation, settled.speaker.content.verdict
    evidence = {"checkpoint_id": checkpoint.id, "reports": settled.reason, **verdict.evidence}
    if verdict.outcome is Outcome.FAILED:
        _note(tx, now, "evaluation.failed", task, check.worker_id, verdict.reason, evidence)
        rollback.reject(
            tx, now, task, worker_id=check.worker_id, reason=verdict.reason, is_proven=settled.convicts, all_of_it=True
        )
        return
    if any(not c.settled for c in found if c.kind is TaskKind.AUDIT):
        return
    if verdict.outcome is Outcome.UNSURE and not _is_replayed(tx, now, task, checkpoint, worker, found, verdict):
        return
    _note(tx, now, "evaluation.passed", task, check.worker_id, verdict.reason, evidence)
    metrics = json.loads(checkpoint.metrics_json or "{}") | {_GAIN: evaluation.own.gain}
    if evaluation.canary is not None:
        metrics[_CANARY_RISE] = -evaluation.canary.gain
    completion.accept(tx, now, replace(checkpoint, metrics_json=json.dumps(metrics)))


def _is_replayed(
    tx: Connection,
    now: datetime,
    task: TaskRecord,
    checkpoint: CheckpointRecord,
    worker: WorkerRecord,
    found: Sequence[CheckRecord],
    verdict: Verdict,
) -> bool:
    """Whether a replay stands for a model whose scores cannot tell. Asks for one; rejects when it told nothing."""
    audits = [c for c in found if c.kind is TaskKind.AUDIT and c.checkpoint_id == checkpoint.id]
    if not audits:
        _note(tx, now, "evaluation.unsure", task, worker.id, verdict.reason, {"checkpoint_id": checkpoint.id})
        checks.open_audit(tx, now, task, checkpoint, worker)
        return False
    if any(c.report_json for c in audits):
        return True
    rollback.reject(tx, now, task, worker_id=worker.id, reason=f"{verdict.reason}; nor a replay", is_proven=False)
    return False


def _history(tx: Connection, run: RunRecord, task: TaskRecord) -> History:
    """Of the run's accepted experts, for another one; a seed has none like it."""
    if task.kind is TaskKind.SEED:
        return History()
    known = [json.loads(e.metrics_json or "{}") for e in experts.current(tx, run.id) if e.cluster_index >= 0]
    return History(
        gains=[said[_GAIN] for said in known if _GAIN in said],
        canary_rises=[said[_CANARY_RISE] for said in known if _CANARY_RISE in said],
    )


def _cluster_to_judge_on(tx: Connection, run: RunRecord, task: TaskRecord) -> str:
    """Its own; for what trains on the whole corpus, one by lot, so that an evaluator learns of one cluster alone."""
    if task.kind is TaskKind.EXPERT and task.cluster_id is not None and not run.baseline_of:
        return task.cluster_id
    data_run = runs.get_by_id(tx, run.data_run_id)
    return secrets.choice(runs.list_clusters(tx, data_run, limit=data_run.cluster_count)).id


# What reports say


def _reports(
    tx: Connection, group: Sequence[CheckRecord], read: Callable[[CheckRecord], _Content]
) -> list[Report[_Content]]:
    ids = {check.reporter_id for check in group if check.report_json}
    rows = tx.execute(select(workers.c.id, workers.c.trusted).where(workers.c.id.in_(ids)))
    trusted = {row.id: bool(row.trusted) for row in rows}
    return [
        Report(
            worker_id=check.reporter_id,
            account_id=check.reporter_account_id or "",
            trusted=trusted[check.reporter_id],
            proven=identities.account_standing(tx, check.reporter_account_id or "").is_proven,
            content=read(check),
        )
        for check in group
        if check.report_json and check.reporter_id is not None
    ]


def _replay(check: CheckRecord) -> Replay:
    said = json.loads(check.report_json)
    moved, original_moved = moved_from_json(check.moved_json)
    return Replay(
        computation=Computation.of(said["computation"]),
        equal=said["equal"] is True,
        deviation=_number(said["deviation"]),
        digests=check.digests_json,
        moved=moved,
        original_moved=original_moved,
    )


def _failures(group: Sequence[CheckRecord]) -> int:
    return sum(check.task_state in (TaskState.FAILED, TaskState.DONE) and not check.report_json for check in group)


def _asks(tx: Connection, now: datetime, group: Sequence[CheckRecord]) -> bool:
    """Whether somebody is being asked already. Checks that ended without a report are done with here."""
    ended = [c for c in group if not c.settled and not c.report_json and c.task_state not in checks.OPEN]
    checks.settle(tx, now, ended, "it ended without a report")
    return any(check.task_state in checks.OPEN for check in group)


@dataclass(frozen=True, kw_only=True)
class _Liar:
    worker_id: str
    reason: str


def _note_dissent(
    tx: Connection, now: datetime, task: TaskRecord, settled: Settlement[_Content], liars: list[_Liar]
) -> None:
    """Against a verdict nobody stands unpunished; `decide` strikes the liars noted here."""
    for worker_id in settled.dissenters:
        if settled.convicts:
            liars.append(_Liar(worker_id=worker_id, reason=f"its report is not so: {settled.reason}"))
            continue
        identities.change_standing(tx, worker_id, lambda standing: standing.after_dissent())
        _note(tx, now, "worker.dissented", task, worker_id, settled.reason, {})


def _note(
    tx: Connection, now: datetime, kind: str, task: TaskRecord, worker_id: str, reason: str, detail: dict[str, object]
) -> None:
    events.append(
        tx, now, kind, run_id=task.run_id, task_id=task.id, worker_id=worker_id, reason=reason,
        detail=events.plain(detail),
    )  # fmt: skip


def _worker_of(tx: Connection, checkpoint: CheckpointRecord) -> WorkerRecord:
    worker_id = tx.execute(select(leases.c.worker_id).where(leases.c.id == checkpoint.lease_id)).scalar_one()
    return identities.get_worker(tx, worker_id)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
