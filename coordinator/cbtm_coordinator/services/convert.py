"""Records of the registry as protos, and what protos say in the registry's terms."""

from __future__ import annotations

import json

from google.protobuf.json_format import MessageToDict

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.files import FileSpec
from cbtm_common.protos import struct, timestamp
from cbtm_coordinator.lifecycle import Verification
from cbtm_coordinator.store.records import (
    CheckpointRecord,
    ClusterRecord,
    EventRecord,
    ExpertRecord,
    LeaseRecord,
    RunRecord,
    ShardRecord,
    TaskRecord,
    TokenRecord,
    WorkerRecord,
)


def run(record: RunRecord) -> pb.Run:
    return pb.Run(
        id=record.id,
        name=record.name,
        state=pb.RunState.Value(f"RUN_STATE_{record.state}"),
        paused=record.paused,
        cluster_count=record.cluster_count,
        recipe_json=record.recipe_json,
        baseline_of=record.baseline_of or "",
        reason=record.reason,
        create_time=timestamp(record.create_time),
        update_time=timestamp(record.update_time),
        train_tokens=record.train_tokens,
        documents=record.documents,
        budget_tokens=record.budget_tokens,
        verification=pb.Verification.Value(f"VERIFICATION_{record.verification}"),
        routing_json=record.routing_json,
    )


def cluster(record: ClusterRecord, *, examples: bool = True) -> pb.Cluster:
    return pb.Cluster(
        id=record.id,
        run_id=record.run_id,
        index=record.cluster_index,
        documents=record.documents,
        train_tokens=record.train_tokens,
        held_out_tokens=record.held_out_tokens,
        top_terms=json.loads(record.top_terms_json),
        example_documents=json.loads(record.examples_json) if examples else [],
    )


def shard(record: ShardRecord) -> pb.Shard:
    return pb.Shard(
        id=record.id,
        cluster_id=record.cluster_id,
        split=pb.Split.Value(f"SPLIT_{record.split}"),
        ordinal=record.ordinal,
        file=shard_file(record).to_proto(),
        tokens=record.tokens,
        documents=record.documents,
    )


def shard_file(record: ShardRecord) -> FileSpec:
    return FileSpec(path=record.key.rpartition("/")[2], key=record.key, size=record.size, sha256=record.sha256)


def task(record: TaskRecord) -> pb.Task:
    return pb.Task(
        id=record.id,
        run_id=record.run_id,
        kind=pb.TaskKind.Value(f"TASK_KIND_{record.kind}"),
        cluster_id=record.cluster_id or "",
        cluster_index=record.cluster_index,
        state=task_state(record),
        total_steps=record.total_steps,
        committed_step=record.committed_step,
        attempts=record.attempts,
        max_attempts=record.max_attempts,
        epoch=record.epoch,
        reason=record.reason,
        not_before_time=timestamp(record.not_before_time),
    )


def task_state(record: TaskRecord) -> pb.TaskState.ValueType:
    return pb.TaskState.Value(f"TASK_STATE_{record.state}")


def lease(record: LeaseRecord, *, committed_step: int = 0) -> pb.Lease:
    return pb.Lease(
        id=record.id,
        task_id=record.task_id,
        worker_id=record.worker_id,
        epoch=record.epoch,
        state=pb.LeaseState.Value(f"LEASE_STATE_{record.state}"),
        acquire_time=timestamp(record.acquire_time),
        expire_time=timestamp(record.expire_time),
        end_time=timestamp(record.end_time),
        reason=record.reason,
        progress=pb.Progress(
            step=record.step,
            loss=record.loss or 0.0,
            tokens_per_second=record.tokens_per_second,
            committed_step=committed_step,
            phase=record.phase,
            transferred_bytes=record.transferred_bytes,
        ),
    )


def checkpoint(record: CheckpointRecord, *, files: bool = True) -> pb.Checkpoint:
    return pb.Checkpoint(
        id=record.id,
        task_id=record.task_id,
        lease_id=record.lease_id,
        epoch=record.epoch,
        step=record.step,
        state=pb.CheckpointState.Value(f"CHECKPOINT_STATE_{record.state}"),
        files=[f.to_proto() for f in record.files] if files else [],
        final=record.final,
        create_time=timestamp(record.create_time),
        commit_time=timestamp(record.commit_time),
        metrics=struct(json.loads(record.metrics_json or "{}")),
        reason=record.reason,
    )


def expert(record: ExpertRecord) -> pb.Expert:
    return pb.Expert(
        id=record.id,
        run_id=record.run_id,
        cluster_id=record.cluster_id or "",
        cluster_index=record.cluster_index,
        version=record.version,
        files=[f.to_proto() for f in record.files],
        checkpoint_id=record.checkpoint_id or "",
        create_time=timestamp(record.create_time),
        metrics=struct(json.loads(record.metrics_json or "{}")),
    )


def worker(record: WorkerRecord, *, live: LeaseRecord | None = None, account: str = "") -> pb.Worker:
    return pb.Worker(
        id=record.id,
        name=record.name,
        state=pb.WorkerState.Value(f"WORKER_STATE_{record.state}"),
        hardware=pb.Hardware(**json.loads(record.hardware_json)),
        version=record.version,
        register_time=timestamp(record.register_time),
        last_seen_time=timestamp(record.last_seen_time),
        lease=lease(live) if live else None,
        finished_tasks=record.finished_tasks,
        failed_tasks=record.failed_tasks,
        reason=record.reason,
        account_id=record.account_id,
        account=account,
        trust=record.trust,
        verified_tokens=record.verified_tokens,
        trusted=record.trusted,
        strikes=record.strikes,
    )


def token(record: TokenRecord, *, account: str = "") -> pb.Token:
    return pb.Token(
        id=record.id,
        role=pb.TokenRole.Value(f"TOKEN_ROLE_{record.role}"),
        label=record.label,
        create_time=timestamp(record.create_time),
        expire_time=timestamp(record.expire_time),
        max_uses=record.max_uses,
        uses=record.uses,
        revoked=record.revoked,
        account_id=record.account_id,
        account=account,
        trusted=record.trusted,
    )


def event(record: EventRecord) -> pb.Event:
    return pb.Event(
        id=record.id,
        event_time=timestamp(record.event_time),
        kind=record.kind,
        run_id=record.run_id,
        task_id=record.task_id,
        lease_id=record.lease_id,
        worker_id=record.worker_id,
        reason=record.reason,
        detail=struct(json.loads(record.detail_json or "{}")),
    )


def verification_of(value: pb.Verification.ValueType) -> Verification | None:
    """None when it is not set."""
    if value == pb.VERIFICATION_UNSPECIFIED:
        return None
    return Verification(pb.Verification.Name(value).removeprefix("VERIFICATION_"))


def printable(text: str, length: int) -> str:
    """The first of `text` on one line; a database takes no NUL, and a terminal should obey no worker."""
    return "".join(c if c.isprintable() else " " for c in text[:length])


def hardware_json(hardware: pb.Hardware) -> str:
    return json.dumps(MessageToDict(hardware, preserving_proto_field_name=True) | _integers(hardware))


def _integers(hardware: pb.Hardware) -> dict[str, int]:
    """JSON has no 64-bit integers, so protobuf writes them as strings; we read them back ourselves."""
    names = ("device_memory_bytes", "memory_bytes", "free_disk_bytes")
    return {name: int(getattr(hardware, name)) for name in names}
