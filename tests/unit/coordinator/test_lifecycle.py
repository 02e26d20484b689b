"""The transition table: every pair of state and event, and nothing beside it."""

from __future__ import annotations

import itertools

import pytest

from cbtm_common.errors import InvalidState
from cbtm_coordinator.lifecycle import (
    TRANSITIONS,
    Actor,
    CheckpointState,
    LeaseState,
    RunState,
    State,
    TaskState,
    sources,
    transition,
)

_STATES: list[State] = [*RunState, *TaskState, *LeaseState, *CheckpointState]
_EVENTS = sorted({name for table in TRANSITIONS.values() for _, name in table})
# Drawn from the design, independently of the table: what may lead to what.
_EDGES: list[tuple[State, set[State]]] = [
    (RunState.DRAFT, {RunState.CLUSTERED}),
    (RunState.CLUSTERED, {RunState.SEEDING, RunState.TRAINING}),
    (RunState.SEEDING, {RunState.TRAINING, RunState.FAILED}),
    (RunState.TRAINING, {RunState.COMPLETE, RunState.FAILED}),
    (RunState.FAILED, {RunState.SEEDING, RunState.TRAINING}),
    (RunState.COMPLETE, {RunState.TRAINING}),
    (TaskState.BLOCKED, {TaskState.PENDING}),
    (TaskState.PENDING, {TaskState.LEASED, TaskState.SUBMITTED, TaskState.PENDING, TaskState.FAILED}),
    (TaskState.LEASED, {TaskState.PENDING, TaskState.FAILED, TaskState.SUBMITTED, TaskState.DONE}),
    (TaskState.SUBMITTED, {TaskState.DONE, TaskState.PENDING}),
    (TaskState.DONE, {TaskState.PENDING}),
    (TaskState.FAILED, {TaskState.PENDING}),
    (LeaseState.LIVE, {LeaseState.RELEASED, LeaseState.EXPIRED, LeaseState.REVOKED}),
    (LeaseState.RELEASED, set()),
    (LeaseState.EXPIRED, set()),
    (LeaseState.REVOKED, set()),
    (CheckpointState.UPLOADING, {CheckpointState.COMMITTED, CheckpointState.REJECTED, CheckpointState.PRUNED}),
    (CheckpointState.COMMITTED, {CheckpointState.ACCEPTED, CheckpointState.REJECTED, CheckpointState.PRUNED}),
    (CheckpointState.ACCEPTED, {CheckpointState.REJECTED, CheckpointState.PRUNED}),
    (CheckpointState.REJECTED, {CheckpointState.PRUNED}),
    (CheckpointState.PRUNED, set()),
]


def test_every_state_and_event_either_is_in_the_table_or_is_refused_with_what_is_possible() -> None:
    for state, event in itertools.product(_STATES, _EVENTS):
        table = TRANSITIONS[type(state)]
        expected = table.get((state, event))
        if expected is not None:
            assert transition(state, event) is expected.target
            continue
        possible = sorted(name for origin, name in table if origin is state) or ["nothing"]
        with pytest.raises(InvalidState) as refused:
            transition(state, event)
        assert state.value in refused.value.message
        assert all(name in refused.value.message for name in possible)
        assert refused.value.metadata == {"state": state.value, "event": event}


def test_the_table_has_exactly_the_edges_of_the_design() -> None:
    assert {id(state) for state, _ in _EDGES} == {id(state) for state in _STATES}
    for state, targets in _EDGES:
        found = [there.target for (origin, _), there in TRANSITIONS[type(state)].items() if origin is state]
        assert set(found) == targets, state


def test_states_of_two_kinds_with_one_name_are_not_taken_for_each_other() -> None:
    assert transition(TaskState.FAILED, "requeue") is TaskState.PENDING
    with pytest.raises(InvalidState, match="a run in state FAILED cannot requeue"):
        transition(RunState.FAILED, "requeue")


def test_no_transition_leaves_its_kind() -> None:
    for kind, table in TRANSITIONS.items():
        for (state, _), found in table.items():
            assert type(state) is type(found.target) is kind


def test_every_state_can_be_reached_from_where_its_kind_begins() -> None:
    for first in (RunState.DRAFT, TaskState.BLOCKED, LeaseState.LIVE, CheckpointState.UPLOADING):
        reached: set[State] = {first}
        table = TRANSITIONS[type(first)]
        while new := {found.target for (state, _), found in table.items() if state in reached} - reached:
            reached |= new
        assert reached == set(type(first))


def test_workers_cause_only_what_concerns_their_own_lease() -> None:
    caused = {key for table in TRANSITIONS.values() for key, found in table.items() if found.actor is Actor.WORKER}
    assert caused == {
        (TaskState.PENDING, "acquire"),
        (TaskState.LEASED, "release"),
        (TaskState.LEASED, "submit"),
        (TaskState.PENDING, "submit"),
        (TaskState.LEASED, "report"),
        (LeaseState.LIVE, "release"),
        (CheckpointState.UPLOADING, "commit"),
    }


def test_sources_are_the_states_that_a_guarded_update_compares_with() -> None:
    assert sources(TaskState, "acquire") == ["PENDING"]
    assert set(sources(TaskState, "requeue")) == {"PENDING", "SUBMITTED", "FAILED", "DONE"}
    assert sources(LeaseState, "acquire") == []
