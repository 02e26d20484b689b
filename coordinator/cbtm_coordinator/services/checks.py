"""What the holder of an EVALUATE or AUDIT task is told, may read, and says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime

from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import InvalidArgument, InvalidState, PermissionDenied
from cbtm_common.files import FileSpec, strip_prefix
from cbtm_coordinator.lifecycle import TaskKind
from cbtm_coordinator.services import convert
from cbtm_coordinator.services.structure import sizes_at
from cbtm_coordinator.store import Connection, acceptance, checkpoints, checks, eligibility, runs, tasks
from cbtm_coordinator.store.completion import MODEL_PREFIX
from cbtm_coordinator.store.records import (
    CheckpointRecord,
    CheckRecord,
    LeaseRecord,
    RunRecord,
    ShardRecord,
    TaskRecord,
    WorkerRecord,
    files_from_json,
)
from cbtm_coordinator.store.runs import HELD_OUT, TRAIN
from cbtm_coordinator.structure.movement import floats, moved, moved_to_json
from cbtm_coordinator.verification.audits import Computation

# Clusters whose text makes up the canary, and that of what trains on the whole corpus.
_CANARY_CLUSTERS = 4
_SETS = ("own", "train", "canary")
_MAX_REPLAYED_FILES = 4096


def describe(tx: Connection, run: RunRecord, check: CheckRecord) -> ws.Check:
    """All that a check needs beside what its subject's worker was told."""
    subject = tasks.get_task(tx, check.subject_id)
    checkpoint = checkpoints.get(tx, check.checkpoint_id)
    message = ws.Check(subject=convert.task(subject))
    if check.kind is TaskKind.AUDIT:
        message.end_step = checkpoint.step
        message.computation.CopyFrom(ws.Computation(**asdict(_computation(checkpoint))))
        return message
    drawn = _drawn(tx, run, subject, check)
    message.model_files.extend(f.to_proto() for f in strip_prefix(checkpoint.files, MODEL_PREFIX))
    for name in _SETS:
        getattr(message, f"{name}_shards").extend(convert.shard(shard) for shard in drawn[name])
    message.sequences = checks.EVALUATION_SEQUENCES
    message.sample_key = check.sample_key
    return message


def begins_at(tx: Connection, check: CheckRecord) -> CheckpointRecord | None:
    """Where an audited segment begins; None at the model that its task branched from."""
    return None if check.base_id is None else checkpoints.get(tx, check.base_id)


def readable(tx: Connection, run: RunRecord, check: CheckRecord, account_id: str) -> list[FileSpec]:
    """What a check may read beside the base model and, of an audit, the training shards of its subject.

    Held-out text is never for an account that trained its cluster, whatever it held since it took this check. What a
    replay is compared with is there to be read once its own digests are known.
    """
    checkpoint = checkpoints.get(tx, check.checkpoint_id)
    if check.kind is TaskKind.AUDIT:
        base = begins_at(tx, check)
        return [*(base.files if base else []), *(checkpoint.files if check.digests_json else [])]
    cluster_id = tasks.get_task(tx, check.task_id).cluster_id
    if cluster_id is not None and eligibility.has_trained(tx, account_id, cluster_id):
        raise PermissionDenied("this account trained the cluster, and may not read its held-out text")
    drawn = _drawn(tx, run, tasks.get_task(tx, check.subject_id), check)
    files = [convert.shard_file(shard) for name in _SETS for shard in drawn[name]]
    return [*checkpoint.files, *files]


def report(
    tx: Connection,
    now: datetime,
    request: ws.ReportCheckRequest,
    lease: LeaseRecord,
    task: TaskRecord,
    reporter: WorkerRecord,
) -> CheckpointRecord | None:
    """Takes a finding and does what follows from it; the checkpoint to compare with when more is asked."""
    check = checks.get(tx, task.id)
    kind = request.WhichOneof("report")
    if kind != {TaskKind.EVALUATE: "evaluation", TaskKind.AUDIT: "audit"}[check.kind]:
        raise InvalidArgument(f"report: a finding of {check.kind} is expected", field="report")
    if check.kind is TaskKind.EVALUATE:
        content = _evaluation(request.evaluation)
    else:
        checkpoint = checkpoints.get(tx, check.checkpoint_id)
        audit = _audit(tx, request.audit, check, checkpoint)
        if audit is None:
            return checkpoint
        content = audit
    checks.report(tx, now, lease, check, reporter, content)
    acceptance.decide(tx, now, check.subject_id)
    return None


def _evaluation(said: ws.EvaluationReport) -> dict[str, object]:
    given = {field.name: score for field, score in said.ListFields()}
    missing = next((name for name in ("own", "train") if name not in given), None)
    if missing is not None:
        raise InvalidArgument(f"evaluation.{missing}: is not set", field=f"evaluation.{missing}")
    content: dict[str, object] = {}
    for name, score in given.items():
        if score.sequences <= 0:
            raise InvalidArgument(f"evaluation.{name}.sequences: {score.sequences}", field=f"evaluation.{name}")
        content[name] = {f.name: getattr(score, f.name) for f in ws.Score.DESCRIPTOR.fields}
    return content


def _audit(
    tx: Connection, said: ws.AuditReport, check: CheckRecord, checkpoint: CheckpointRecord
) -> dict[str, object] | None:
    """The finding; None when digests are not those of the checkpoint, and it must be compared."""
    if not check.digests_json:
        if said.HasField("deviation"):
            raise InvalidState("audit.deviation: the digests of what was replayed come first")
        files = [FileSpec.from_proto(f) for f in said.files]
        if not 1 <= len(files) <= _MAX_REPLAYED_FILES:
            raise InvalidArgument(f"audit.files: {len(files)} given", field="audit.files")
        checks.note_replay(tx, check, files, _moved(tx, said, check))
        equal = _digests(files) == _digests(checkpoint.files)
        if not equal:
            return None
    else:
        if not said.HasField("deviation"):
            return None
        equal = _digests(files_from_json(check.digests_json)) == _digests(checkpoint.files)
    computation = Computation.of({f.name: getattr(said.computation, f.name) for f in ws.Computation.DESCRIPTOR.fields})
    deviation = said.deviation if said.HasField("deviation") else None
    return {"equal": equal, "deviation": deviation, "computation": asdict(computation)}


def _moved(tx: Connection, said: ws.AuditReport, check: CheckRecord) -> str:
    """How the weights moved in the segment, by the replay and by what was committed; empty where that is not known."""
    subject = tasks.get_task(tx, check.subject_id)
    begin, end = sizes_at(tx, subject, check.base_id), sizes_at(tx, subject, check.checkpoint_id)
    names = sorted(name for name in begin.keys() & end.keys() if begin[name].sampled and end[name].sampled)
    if not names:
        return ""
    committed = moved(names, begin, {name: end[name].sampled for name in names})
    replayed = (
        moved(names, begin, {name: floats(told) for name, told in said.sampled.items()}) if said.sampled else None
    )
    return moved_to_json(replayed=replayed, committed=committed)


def _digests(files: Sequence[FileSpec]) -> set[tuple[str, int, str]]:
    """Of the tensors: configs may be written otherwise by another version."""
    return {(f.path, f.size, f.sha256) for f in files if f.path.endswith(".safetensors")}


def _computation(checkpoint: CheckpointRecord) -> Computation:
    return Computation.of(json.loads(checkpoint.metrics_json or "{}"))


# What is scored


def _drawn(tx: Connection, run: RunRecord, subject: TaskRecord, check: CheckRecord) -> dict[str, list[ShardRecord]]:
    """Shards of each set, drawn by the check's key: the same for all who score this checkpoint."""
    own = tasks.get_task(tx, check.task_id).cluster_id
    data_run = runs.get_by_id(tx, run.data_run_id)
    others = [c.id for c in runs.list_clusters(tx, data_run, limit=data_run.cluster_count) if c.id != own]
    others = sorted(others, key=lambda other: _lot(check, other))[:_CANARY_CLUSTERS]

    def one(cluster_id: str | None, split: str) -> list[ShardRecord]:
        found = runs.list_shards(tx, data_run.id, split=split, cluster_id=cluster_id, limit=10_000)
        return sorted((shard for _, shard in found), key=lambda shard: _lot(check, shard.id))[:1]

    whole_corpus = subject.kind is TaskKind.SEED or bool(run.baseline_of)
    own_train, canary = one(own, TRAIN), [shard for other in others for shard in one(other, TRAIN)]
    return {
        # A cluster of a few documents may have none held out; to tell a seed handed back, its own text will do.
        "own": one(own, HELD_OUT) or own_train,
        "train": own_train + (canary if whole_corpus else []),
        "canary": [] if whole_corpus else canary,
    }


def _lot(check: CheckRecord, name: str) -> str:
    return hashlib.sha256(f"{check.sample_key}/{name}".encode()).hexdigest()
