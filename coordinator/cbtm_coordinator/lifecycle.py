"""States, and the one table of what may lead from one to another.

Pure: no clock, no database. The store asks `transition` before each guarded update, so a change of state that is not
in the table cannot be written. Who may cause it stands beside each transition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from cbtm_common.errors import InvalidState


class RunState(StrEnum):
    # Created by its owner; the corpus is being clustered and uploaded.
    DRAFT = "DRAFT"
    # Clusters, shards and base model are registered; set by StartRun, and left in the same transaction.
    CLUSTERED = "CLUSTERED"
    # The SEED task is open; set when a run from scratch starts.
    SEEDING = "SEEDING"
    # EXPERT tasks are open; set at the start, or when the seed is accepted.
    TRAINING = "TRAINING"
    # Every cluster has its expert; set when the last one is accepted.
    COMPLETE = "COMPLETE"
    # A task used up its attempts; set with it, left when its owner requeues it.
    FAILED = "FAILED"


class TaskState(StrEnum):
    # Waits for the run's seed; set when the run starts.
    BLOCKED = "BLOCKED"
    # Open for any worker.
    PENDING = "PENDING"
    # One live lease is on it; set by AcquireLease.
    LEASED = "LEASED"
    # The final checkpoint is committed; set by CommitCheckpoint.
    SUBMITTED = "SUBMITTED"
    # The final checkpoint is accepted as an expert, or as the seed.
    DONE = "DONE"
    # Its attempts are used up; left only by its owner's requeue.
    FAILED = "FAILED"


class LeaseState(StrEnum):
    LIVE = "LIVE"
    # The worker gave it back.
    RELEASED = "RELEASED"
    # Not renewed in time, or renewed without progress; set by the coordinator.
    EXPIRED = "EXPIRED"
    # Taken away: by the owner, who revoked the worker or requeued the task, or with a checkpoint that was rejected.
    REVOKED = "REVOKED"


class CheckpointState(StrEnum):
    # Its files are on their way; nobody but its worker sees it.
    UPLOADING = "UPLOADING"
    # Whole, and checked against the store by the coordinator: work resumes from it.
    COMMITTED = "COMMITTED"
    # The final one, now an expert's.
    ACCEPTED = "ACCEPTED"
    # Refused on its content by the coordinator, with the reason; its objects are deleted.
    REJECTED = "REJECTED"
    # Superseded; its objects are deleted.
    PRUNED = "PRUNED"


class WorkerState(StrEnum):
    ACTIVE = "ACTIVE"
    REVOKED = "REVOKED"


class TaskKind(StrEnum):
    SEED = "SEED"
    EXPERT = "EXPERT"
    # Scores a submitted model; about one checkpoint of another task (`checks` in the registry).
    EVALUATE = "EVALUATE"
    # Trains a committed segment of another task again.
    AUDIT = "AUDIT"


TRAINING = frozenset({TaskKind.SEED, TaskKind.EXPERT})
CHECKING = frozenset({TaskKind.EVALUATE, TaskKind.AUDIT})


class CreditKind(StrEnum):
    # Tokens of a model that was accepted.
    EARNED = "EARNED"
    # By quarantine, of one EARNED before.
    TAKEN_BACK = "TAKEN_BACK"


class Verification(StrEnum):
    """Who checks what a run's workers hand in (docs/decisions/0018-verification.md)."""

    OFF = "OFF"
    PEERS = "PEERS"
    TRUSTED = "TRUSTED"


class Actor(StrEnum):
    OWNER = "owner"
    WORKER = "worker"
    COORDINATOR = "coordinator"


State = RunState | TaskState | LeaseState | CheckpointState


@dataclass(frozen=True, kw_only=True)
class Transition:
    target: State
    actor: Actor


def _to(target: State, actor: Actor) -> Transition:
    return Transition(target=target, actor=actor)


_OWNER, _WORKER, _COORDINATOR = Actor.OWNER, Actor.WORKER, Actor.COORDINATOR

# By kind: states of two kinds may have one name, and enums of strings would then be equal.
TRANSITIONS: Mapping[type[State], Mapping[tuple[State, str], Transition]] = {
    RunState: {
        (RunState.DRAFT, "register"): _to(RunState.CLUSTERED, _OWNER),
        (RunState.CLUSTERED, "start_seeding"): _to(RunState.SEEDING, _OWNER),
        (RunState.CLUSTERED, "start_training"): _to(RunState.TRAINING, _OWNER),
        (RunState.SEEDING, "seed_accepted"): _to(RunState.TRAINING, _COORDINATOR),
        (RunState.SEEDING, "task_failed"): _to(RunState.FAILED, _COORDINATOR),
        (RunState.TRAINING, "task_failed"): _to(RunState.FAILED, _COORDINATOR),
        (RunState.TRAINING, "all_accepted"): _to(RunState.COMPLETE, _COORDINATOR),
        (RunState.FAILED, "requeue_seed"): _to(RunState.SEEDING, _OWNER),
        (RunState.FAILED, "requeue_expert"): _to(RunState.TRAINING, _OWNER),
        (RunState.COMPLETE, "requeue_expert"): _to(RunState.TRAINING, _OWNER),
        # An expert of it was quarantined.
        (RunState.COMPLETE, "expert_rejected"): _to(RunState.TRAINING, _COORDINATOR),
    },
    TaskState: {
        (TaskState.BLOCKED, "seed_accepted"): _to(TaskState.PENDING, _COORDINATOR),
        (TaskState.PENDING, "acquire"): _to(TaskState.LEASED, _WORKER),
        (TaskState.LEASED, "release"): _to(TaskState.PENDING, _WORKER),
        (TaskState.LEASED, "expire"): _to(TaskState.PENDING, _COORDINATOR),
        (TaskState.LEASED, "revoke"): _to(TaskState.PENDING, _OWNER),
        (TaskState.LEASED, "exhaust"): _to(TaskState.FAILED, _COORDINATOR),
        (TaskState.LEASED, "submit"): _to(TaskState.SUBMITTED, _WORKER),
        # A late final checkpoint, from a lease that expired and has no successor.
        (TaskState.PENDING, "submit"): _to(TaskState.SUBMITTED, _WORKER),
        (TaskState.SUBMITTED, "accept"): _to(TaskState.DONE, _COORDINATOR),
        # Work on it was refused on its content or shown to be false, or its worker is quarantined: what was committed
        # before still counts.
        (TaskState.LEASED, "reject"): _to(TaskState.PENDING, _COORDINATOR),
        (TaskState.PENDING, "reject"): _to(TaskState.PENDING, _COORDINATOR),
        (TaskState.SUBMITTED, "reject"): _to(TaskState.PENDING, _COORDINATOR),
        (TaskState.FAILED, "reject"): _to(TaskState.PENDING, _COORDINATOR),
        (TaskState.DONE, "reject"): _to(TaskState.PENDING, _COORDINATOR),
        # A check: its finding is in, or it is not needed any more.
        (TaskState.LEASED, "report"): _to(TaskState.DONE, _WORKER),
        (TaskState.PENDING, "drop"): _to(TaskState.FAILED, _COORDINATOR),
        (TaskState.LEASED, "drop"): _to(TaskState.FAILED, _COORDINATOR),
        (TaskState.PENDING, "requeue"): _to(TaskState.PENDING, _OWNER),
        (TaskState.SUBMITTED, "requeue"): _to(TaskState.PENDING, _OWNER),
        (TaskState.FAILED, "requeue"): _to(TaskState.PENDING, _OWNER),
        (TaskState.DONE, "requeue"): _to(TaskState.PENDING, _OWNER),
    },
    LeaseState: {
        (LeaseState.LIVE, "release"): _to(LeaseState.RELEASED, _WORKER),
        (LeaseState.LIVE, "expire"): _to(LeaseState.EXPIRED, _COORDINATOR),
        (LeaseState.LIVE, "revoke"): _to(LeaseState.REVOKED, _OWNER),
        # It handed in what no honest worker does, what it built on was rejected, or its check is not needed any more.
        (LeaseState.LIVE, "reject"): _to(LeaseState.REVOKED, _COORDINATOR),
    },
    CheckpointState: {
        (CheckpointState.UPLOADING, "commit"): _to(CheckpointState.COMMITTED, _WORKER),
        (CheckpointState.UPLOADING, "reject"): _to(CheckpointState.REJECTED, _COORDINATOR),
        (CheckpointState.UPLOADING, "prune"): _to(CheckpointState.PRUNED, _COORDINATOR),
        (CheckpointState.COMMITTED, "accept"): _to(CheckpointState.ACCEPTED, _COORDINATOR),
        (CheckpointState.COMMITTED, "reject"): _to(CheckpointState.REJECTED, _COORDINATOR),
        (CheckpointState.ACCEPTED, "reject"): _to(CheckpointState.REJECTED, _COORDINATOR),
        (CheckpointState.COMMITTED, "prune"): _to(CheckpointState.PRUNED, _COORDINATOR),
        (CheckpointState.REJECTED, "prune"): _to(CheckpointState.PRUNED, _COORDINATOR),
        (CheckpointState.ACCEPTED, "prune"): _to(CheckpointState.PRUNED, _COORDINATOR),
    },
}


def transition(state: State, event: str) -> State:
    """Where `event` leads from `state`. Raises InvalidState, saying what is possible instead."""
    table = TRANSITIONS[type(state)]
    found = table.get((state, event))
    if found is None:
        possible = sorted(name for origin, name in table if origin is state)
        kind = type(state).__name__.removesuffix("State").lower()
        raise InvalidState(
            f"a {kind} in state {state} cannot {event.replace('_', ' ')}; possible: {', '.join(possible) or 'nothing'}",
            metadata={"state": state.value, "event": event},
        )
    return found.target


def sources(kind: type[RunState] | type[TaskState] | type[LeaseState] | type[CheckpointState], event: str) -> list[str]:
    """The states from which `event` is possible: what a guarded update compares with."""
    return [state.value for state, name in TRANSITIONS[kind] if name == event]
