"""The registry's tables. Invariants live here, as constraints, and hold whatever a process does.

- one LIVE lease a task: partial unique index `uq_leases_live_task`;
- an epoch is never reused: UNIQUE (task_id, epoch);
- states are closed sets: CHECK;
- one training task a cluster: partial unique index `uq_tasks_training`;
- one expert a cluster and version: UNIQUE;
- a request is answered once: primary key (request_id, method, principal);
- a segment is credited once, and taken back once: UNIQUE (checkpoint_id, kind);
- events and credits are appended only: no statement in the store updates or deletes them.

Tables are imported from here, never from a module of this package, so that `metadata` always holds all of them.
"""

from cbtm_coordinator.tables.columns import UtcDateTime, metadata
from cbtm_coordinator.tables.content import architectures, clusters, run_files, runs, shards
from cbtm_coordinator.tables.history import events, requests
from cbtm_coordinator.tables.people import accounts, credits, tokens, workers
from cbtm_coordinator.tables.work import checkpoint_sizes, checkpoints, checks, experts, leases, tasks, unfit

__all__ = [
    "UtcDateTime",
    "accounts",
    "architectures",
    "checkpoint_sizes",
    "checkpoints",
    "checks",
    "clusters",
    "credits",
    "events",
    "experts",
    "leases",
    "metadata",
    "requests",
    "run_files",
    "runs",
    "shards",
    "tasks",
    "tokens",
    "unfit",
    "workers",
]
