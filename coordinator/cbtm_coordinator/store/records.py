"""What the store returns: frozen records, never rows and never protos."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from enum import StrEnum
from functools import cache
from typing import Any, Self

from sqlalchemy import Label, Row, Table

from cbtm_common.files import FileSpec
from cbtm_coordinator.lifecycle import (
    CheckpointState,
    LeaseState,
    RunState,
    TaskKind,
    TaskState,
    Verification,
    WorkerState,
)
from cbtm_coordinator.scheduler import Measured

_ENUMS = {
    e.__name__: e for e in (RunState, TaskState, TaskKind, LeaseState, CheckpointState, WorkerState, Verification)
}


class _FromRow:
    @classmethod
    def of(cls, row: Row[Any] | Mapping[str, Any], *, prefix: str = "") -> Self:
        """From a row that has at least this record's columns, their names after `prefix`; states become their enums."""
        values = row._mapping if isinstance(row, Row) else row
        columns = _columns(cls)  # type: ignore[arg-type]  # a class is hashable
        return cls(**{name: kind(values[prefix + name]) if kind else values[prefix + name] for name, kind in columns})


def prefixed(table: Table) -> list[Label[Any]]:
    """A table's columns under names of their own, for a row of several tables: `leases.id` is `leases_id`."""
    return [column.label(f"{table.name}_{column.name}") for column in table.columns]


@cache
def _columns(record: type[Any]) -> list[tuple[str, type[StrEnum] | None]]:
    """The columns of a record, each with its enum if it is a state."""
    return [(field.name, _ENUMS.get(str(field.type))) for field in fields(record)]


@dataclass(frozen=True, kw_only=True)
class RunRecord(_FromRow):
    id: str
    name: str
    state: RunState
    paused: bool
    cluster_count: int
    recipe_json: str
    from_scratch: bool
    baseline_of: str | None
    model_parameters: int
    train_tokens: int
    documents: int
    budget_tokens: int
    verification: Verification
    routing_json: str
    reason: str
    create_time: datetime
    update_time: datetime

    @property
    def data_run_id(self) -> str:
        """The run whose files and shards this one uses: its own, or those it is the baseline of."""
        return self.baseline_of or self.id


@dataclass(frozen=True, kw_only=True)
class ClusterRecord(_FromRow):
    id: str
    run_id: str
    cluster_index: int
    documents: int
    train_tokens: int
    held_out_tokens: int
    top_terms_json: str
    examples_json: str


@dataclass(frozen=True, kw_only=True)
class ShardRecord(_FromRow):
    id: str
    cluster_id: str
    split: str
    ordinal: int
    key: str
    size: int
    sha256: str
    tokens: int
    documents: int


@dataclass(frozen=True, kw_only=True)
class TaskRecord(_FromRow):
    id: str
    run_id: str
    kind: TaskKind
    cluster_id: str | None
    cluster_index: int
    state: TaskState
    total_steps: int
    committed_step: int
    attempts: int
    max_attempts: int
    epoch: int
    not_before_time: datetime
    reason: str


@dataclass(frozen=True, kw_only=True)
class LeaseRecord(_FromRow):
    id: str
    task_id: str
    worker_id: str
    epoch: int
    state: LeaseState
    acquire_time: datetime
    expire_time: datetime
    renew_time: datetime
    stall_time: datetime
    end_time: datetime | None
    reason: str
    step: int
    loss: float | None
    tokens_per_second: float
    phase: str
    transferred_bytes: int


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord(_FromRow):
    id: str
    task_id: str
    lease_id: str
    epoch: int
    step: int
    state: CheckpointState
    final: bool
    files_json: str
    metrics_json: str
    reason: str
    create_time: datetime
    commit_time: datetime | None

    @property
    def files(self) -> list[FileSpec]:
        return files_from_json(self.files_json)


@dataclass(frozen=True, kw_only=True)
class ExpertRecord(_FromRow):
    id: str
    run_id: str
    cluster_id: str | None
    cluster_index: int
    version: int
    checkpoint_id: str | None
    files_json: str
    metrics_json: str
    create_time: datetime

    @property
    def files(self) -> list[FileSpec]:
        return files_from_json(self.files_json)


@dataclass(frozen=True, kw_only=True)
class WorkerRecord(_FromRow):
    id: str
    account_id: str
    name: str
    state: WorkerState
    hardware_json: str
    version: str
    public_key: str | None
    signed_time_us: int
    register_time: datetime
    last_seen_time: datetime
    finished_tasks: int
    failed_tasks: int
    failures: int
    not_before_time: datetime | None
    reason: str
    trusted: bool
    trust: float
    strikes: int
    at_risk: float
    verified_tokens: int


@dataclass(frozen=True, kw_only=True)
class CheckRecord(_FromRow):
    """What an EVALUATE or AUDIT task is about; `report_json` is empty until it was reported."""

    # Of its own task.
    task_state: TaskState
    # Of the checkpoint.
    step: int

    task_id: str
    kind: TaskKind
    subject_id: str
    checkpoint_id: str
    base_id: str | None
    worker_id: str
    account_id: str
    confirms: bool
    sample_key: str
    digests_json: str
    moved_json: str
    report_json: str
    reporter_id: str | None
    reporter_account_id: str | None
    settled: bool


@dataclass(frozen=True, kw_only=True)
class TokenRecord(_FromRow):
    id: str
    account_id: str
    role: str
    label: str
    create_time: datetime
    expire_time: datetime | None
    max_uses: int
    uses: int
    recovers_worker_id: str
    revoked: bool
    trusted: bool


@dataclass(frozen=True, kw_only=True)
class EventRecord(_FromRow):
    id: int
    event_time: datetime
    kind: str
    run_id: str
    task_id: str
    lease_id: str
    worker_id: str
    reason: str
    detail_json: str


@dataclass(frozen=True, kw_only=True)
class RunFile(_FromRow):
    """A file of a run: `kind` is CLUSTERING, TOKENIZER, BASE_MODEL or REPORT."""

    run_id: str
    kind: str
    path: str
    key: str
    size: int
    sha256: str

    @property
    def file(self) -> FileSpec:
        return FileSpec(path=self.path, key=self.key, size=self.size, sha256=self.sha256)


@dataclass(frozen=True, kw_only=True)
class NewShard:
    split: str
    ordinal: int
    file: FileSpec
    tokens: int
    documents: int


@dataclass(frozen=True, kw_only=True)
class NewCluster:
    cluster_index: int
    documents: int
    top_terms: Sequence[str]
    examples: Sequence[str]
    shards: Sequence[NewShard]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a renewal tells of a lease."""

    step: int = 0
    loss: float | None = None
    tokens_per_second: float = 0.0
    phase: str = ""
    transferred_bytes: int = 0
    measured: Measured = field(default_factory=Measured)


def files_to_json(files: Sequence[FileSpec]) -> str:
    return json.dumps([[f.path, f.key, f.size, f.sha256] for f in files])


def files_from_json(text: str) -> list[FileSpec]:
    return [FileSpec(path=p, key=k, size=s, sha256=h) for p, k, s, h in json.loads(text)]
