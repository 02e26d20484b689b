"""The checks find what they are for: each is shown a state with one planted violation, and one without."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.chaos import checks
from tests.chaos.schedule import Fault, schedule

_START = datetime(2026, 1, 1, tzinfo=UTC)


def _lease(name: str, begin: int, end: int | None, *, epoch: int, task: str = "t") -> dict[str, Any]:
    return {
        "id": name,
        "task_id": task,
        "epoch": epoch,
        "acquire_time": _START + timedelta(seconds=begin),
        "end_time": None if end is None else _START + timedelta(seconds=end),
    }


def _files(key: str, data: bytes, *, path: str = "model.safetensors") -> str:
    return json.dumps([[path, key, len(data), hashlib.sha256(data).hexdigest()]])


def test_leases_one_after_the_other_are_well() -> None:
    assert not checks.leases_overlap([_lease("a", 0, 5, epoch=1), _lease("b", 5, None, epoch=2)])
    assert not checks.leases_overlap([_lease("a", 0, None, epoch=1), _lease("b", 1, None, epoch=1, task="other")])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (_lease("a", 0, None, epoch=1), _lease("b", 5, None, epoch=2)),
        (_lease("a", 0, 6, epoch=1), _lease("b", 5, 9, epoch=2)),
        (_lease("a", 0, 5, epoch=2), _lease("b", 5, None, epoch=2)),
        (_lease("a", 0, 5, epoch=3), _lease("b", 6, None, epoch=2)),
    ],
    ids=["both-live", "overlap", "epoch-reused", "epoch-fell"],
)
def test_two_leases_at_once_and_epochs_that_do_not_rise_are_found(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    assert len(checks.leases_overlap([second, first])) == 1


@pytest.mark.parametrize("state", ["COMMITTED", "ACCEPTED", "UPLOADING", "PRUNED"])
def test_a_visible_checkpoint_with_a_missing_or_wrong_object_is_found(state: str) -> None:
    row = {"id": "c", "step": 1, "state": state, "files_json": _files("k", b"good")}
    assert not checks.checkpoints_wrong([row], {"k": b"good"}.get)
    visible = state in ("COMMITTED", "ACCEPTED")
    for stored in ({}, {"k": b"evil"}, {"k": b"goo"}):
        assert bool(checks.checkpoints_wrong([row], stored.get)) is visible


def test_an_expert_with_other_weights_is_found() -> None:
    digest = hashlib.sha256(b"weights").hexdigest()
    rows = [{"cluster_index": 0, "version": v, "files_json": _files("k", b)} for v, b in ((1, b"weights"), (2, b"w"))]
    assert not checks.experts_differ(rows[:1], {0: {"model.safetensors": digest}})
    assert len(checks.experts_differ(rows, {0: {"model.safetensors": digest}})) == 1
    assert len(checks.experts_differ(rows[:1], {0: {"model.safetensors": digest, "more": digest}})) == 1


def test_a_task_that_is_not_done_is_found() -> None:
    assert checks.unfinished([{"id": "t", "state": "FAILED", "reason": "r"}])
    assert not checks.unfinished([{"id": "t", "state": "DONE", "reason": ""}])


def test_what_was_taken_away_without_a_reason_is_found() -> None:
    silent = {"id": "x", "state": "EXPIRED", "reason": ""}
    assert checks.reasons_missing([silent], [], [])
    assert checks.reasons_missing([], [silent | {"state": "PRUNED"}], [])
    assert checks.reasons_missing([], [], [{"id": "x", "kind": "lease.expired", "reason": ""}])
    assert not checks.reasons_missing([silent | {"reason": "late"}, silent | {"state": "RELEASED"}], [], [])


def test_an_object_that_nothing_knows_is_found_and_one_of_a_pruned_checkpoint_too() -> None:
    kept = {"state": "COMMITTED", "files_json": _files("kept", b"")}
    pruned = {"state": "PRUNED", "files_json": _files("pruned", b"")}
    known = checks.known_keys([{"key": "base"}], [{"key": "shard"}], [{"files_json": _files("e", b"")}], [kept, pruned])
    assert known == {"base", "shard", "e", "kept"}
    assert not checks.orphans(known, known)
    assert len(checks.orphans([*known, "pruned", "stray"], known)) == 2


def test_a_traceback_in_a_log_is_found_by_its_last_line() -> None:
    log = "INFO all is well\nTraceback (most recent call last):\n  File x\n    y()\nKeyError: 'z'\nINFO on\n"
    assert checks.tracebacks(log) == ["a traceback: KeyError: 'z'"]
    assert checks.tracebacks("INFO all is well\n") == []


def _task(epoch: int, step: int) -> list[dict[str, Any]]:
    return [{"id": "t", "epoch": epoch, "committed_step": step}]


def test_the_watch_is_content_with_progress_and_with_a_restart_by_the_owner() -> None:
    watch = checks.Watch()
    live = [{"id": "l", "task_id": "t"}]
    watch.look(_task(1, 10), live, {})
    watch.look(_task(1, 20), live, {})
    watch.look(_task(2, 0), [], {"t": 1})
    watch.look(_task(2, 5), live, {"t": 1})
    assert watch.violations == []


def test_the_watch_sees_lost_work_a_fallen_epoch_and_two_live_leases() -> None:
    watch = checks.Watch()
    watch.look(_task(2, 20), [], {"t": 1})
    watch.look(_task(2, 10), [], {"t": 1})
    assert "lost committed work" in watch.violations[-1]
    watch.look(_task(1, 10), [], {"t": 1})
    assert "the epoch of t fell" in watch.violations[-1]
    watch.look(_task(1, 10), [{"id": "a", "task_id": "t"}, {"id": "b", "task_id": "t"}], {"t": 1})
    assert "live at once" in watch.violations[-1]
    assert len(watch.violations) == 3


def test_one_seed_is_one_schedule_with_every_kind_of_fault() -> None:
    one = list(schedule(5, seconds=60, every=1.5, lease_seconds=3))
    assert one == list(schedule(5, seconds=60, every=1.5, lease_seconds=3))
    assert one != list(schedule(6, seconds=60, every=1.5, lease_seconds=3))
    assert {planned.fault for planned in one} == set(Fault)
    assert all(0 < planned.at < 60 for planned in one)
    assert all(planned.lasts > 3 for planned in one if planned.fault is Fault.WORKER_STOP)
