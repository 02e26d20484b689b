"""The worker's life against a scripted coordinator; what happens within a task is scripted too."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.cache import ContentCache
from cbtm_common.errors import (
    Cancelled,
    CbtmError,
    IntegrityError,
    LeaseLost,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from cbtm_worker import loop
from cbtm_worker.config import WorkerConfig
from cbtm_worker.display import Display
from cbtm_worker.heartbeat import Heartbeat
from cbtm_worker.identity import take_slot
from cbtm_worker.inputs import Unfit
from cbtm_worker.loop import Worker
from cbtm_worker.task import Outcome
from cbtm_worker.train import Diverged, OutOfDeviceMemory
from tests.support.scripted_coordinator import ScriptedCoordinator, lease_of

# What a task does: gives its outcome, or raises.
Script = Callable[[Heartbeat], Outcome]


def gives(outcome: Outcome) -> Script:
    return lambda heartbeat: outcome


def raises(error: Exception) -> Script:
    def run(heartbeat: Heartbeat) -> Outcome:
        raise error

    return run


class Bench:
    """`scripts` are what the tasks do, in order; `continued` tells which went on with a former process's lease."""

    def __init__(self, root: Path, coordinator: ScriptedCoordinator) -> None:
        self.root = root
        self.coordinator = coordinator
        self.scripts: list[Script] = []
        self.continued: list[bool] = []
        self.stop = threading.Event()
        self.out = io.StringIO()
        self.slot_directory = root

    def run(self, *, token: str | None = "join-token", **options: Any) -> int:
        """One process's life: the number of finished tasks."""
        options.setdefault("until_idle", True)
        config = WorkerConfig(
            coordinator=self.coordinator.target, token=token, cache_dir=self.root, name="box", **options
        )
        display = Display(Console(file=self.out, soft_wrap=True, width=200))
        slot = take_slot(self.root, "coordinator")
        cache = ContentCache(self.root / "files")
        self.slot_directory = slot.directory
        try:
            with self.coordinator.connect() as connection, self.coordinator.transfer() as transfer:
                return Worker(config, self.stop, display, slot, connection, transfer, cache, "cpu").run()
        finally:
            cache.close()
            slot.release()

    def released(self) -> list[tuple[str, str]]:
        found = self.coordinator.requests("ReleaseLease")
        return [(ws.ReleaseReason.Name(r.release_reason).removeprefix("RELEASE_REASON_"), r.detail) for r in found]

    @property
    def said(self) -> str:
        return self.out.getvalue()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with ScriptedCoordinator() as coordinator:
        made = Bench(tmp_path, coordinator)

        class ScriptedTask:
            def __init__(self, *arguments: Any, continued: bool) -> None:
                self._heartbeat = arguments[3]
                made.continued.append(continued)

            def run(self) -> Outcome:
                return made.scripts.pop(0)(self._heartbeat)

        monkeypatch.setattr(loop, "TaskRunner", ScriptedTask)
        monkeypatch.setattr(loop, "describe", lambda device, cache_dir: pb.Hardware(device_type="cpu"))
        monkeypatch.setattr(loop, "_OUTAGE_WAIT", 0.001)
        monkeypatch.setattr(loop, "_FULL_DISK_WAIT", 0.001)
        yield made


def test_tasks_are_taken_and_finished_until_there_are_no_more(bench: Bench) -> None:
    bench.coordinator.leases = [lease_of("task_1"), lease_of("task_2", committed_step=5)]
    bench.scripts = [gives(Outcome.FINISHED)] * 2
    assert bench.run() == 2
    assert bench.released() == [("FINISHED", "")] * 2
    assert bench.coordinator.bearers("Register") == ["join-token"]
    assert set(bench.coordinator.bearers("AcquireLease")) == {"credential_1"}
    assert "took cluster 3 of web, from the start" in bench.said
    assert "took cluster 3 of web, from step 5" in bench.said
    assert "leaving: there is no work left" in bench.said


def test_a_limit_on_tasks_is_kept(bench: Bench) -> None:
    bench.coordinator.leases = [lease_of("task_1"), lease_of("task_2")]
    bench.scripts = [gives(Outcome.FINISHED)] * 2
    assert bench.run(max_tasks=1) == 1
    assert len(bench.coordinator.leases) == 1


def test_the_second_time_no_token_is_needed(bench: Bench) -> None:
    bench.run()
    bench.run(token=None)
    assert len(bench.coordinator.requests("Register")) == 1
    assert set(bench.coordinator.bearers("AcquireLease")) == {"credential_1"}


def test_the_first_time_it_is(bench: Bench) -> None:
    with pytest.raises(Unauthenticated, match="--token"):
        bench.run(token=None)


def test_a_lease_whose_answer_was_lost_is_asked_for_again_by_the_same_request(bench: Bench) -> None:
    bench.coordinator.errors["AcquireLease"] = [Unavailable("away"), Unavailable("away")]
    bench.coordinator.leases = [lease_of()]
    bench.scripts = [gives(Outcome.FINISHED)]
    assert bench.run() == 1
    ids = [request.request_id for request in bench.coordinator.requests("AcquireLease")]
    assert len(ids) == 4
    assert len(set(ids[:3])) == 1
    assert ids[3] not in ids[:3]
    # An outage is told once, however long.
    assert bench.said.count("the coordinator cannot be asked for work") == 1


def test_a_coordinator_that_forgot_this_worker_is_joined_anew_once(bench: Bench) -> None:
    bench.run()
    bench.coordinator.errors["AcquireLease"] = [Unauthenticated("unknown")]
    bench.run()
    assert len(bench.coordinator.requests("Register")) == 2
    assert bench.coordinator.bearers("AcquireLease")[-1] == "credential_2"
    bench.coordinator.errors["AcquireLease"] = [Unauthenticated("unknown")] * 2
    with pytest.raises(Unauthenticated):
        bench.run()


def test_a_revoked_worker_leaves_and_says_why(bench: Bench) -> None:
    bench.coordinator.errors["AcquireLease"] = [PermissionDenied("this worker was revoked by the owner: odd numbers")]
    with pytest.raises(PermissionDenied, match="odd numbers"):
        bench.run()


def test_a_run_that_does_not_exist_is_not_waited_for(bench: Bench) -> None:
    bench.coordinator.errors["AcquireLease"] = [NotFound("there is no run nope")]
    with pytest.raises(NotFound, match="nope"):
        bench.run(run="nope")


def test_a_coordinator_that_does_not_answer_at_first_is_an_error_with_a_remedy(bench: Bench) -> None:
    bench.coordinator.errors["Register"] = [Unavailable("connection refused")]
    with pytest.raises(Unavailable, match="is the address right"):
        bench.run()


@pytest.mark.parametrize(
    ("error", "reason", "detail"),
    [
        (Diverged("the loss is nan"), "FAILED", "the loss is nan"),
        (IntegrityError("other bytes"), "FAILED", "other bytes"),
        (RuntimeError("a defect"), "FAILED", "RuntimeError: a defect"),
        (OutOfDeviceMemory("does not fit"), "UNFIT", "does not fit"),
        (Unfit("the disk is too small"), "UNFIT", "the disk is too small"),
        (ResourceExhausted("the disk is full"), "PREEMPTED", "the disk is full"),
    ],
)
def test_a_task_that_cannot_go_on_here_is_given_back_with_the_reason(
    bench: Bench, error: Exception, reason: str, detail: str
) -> None:
    bench.coordinator.leases = [lease_of("task_1"), lease_of("task_2")]
    bench.scripts = [raises(error), gives(Outcome.FINISHED)]
    assert bench.run() == 1
    assert bench.released() == [(reason, detail), ("FINISHED", "")]
    assert f"cannot go on with cluster 3 of web: {detail}" in bench.said


def test_a_failed_tasks_local_state_is_not_gone_on_from(bench: Bench) -> None:
    bench.coordinator.leases = [lease_of("task_1")]
    kept = []

    def fail(heartbeat: Heartbeat) -> Outcome:
        folder = bench.slot_directory / "tasks" / "task_1" / "s0000000004"
        folder.mkdir(parents=True)
        kept.append(folder)
        raise IntegrityError("a damaged checkpoint")

    bench.scripts = [fail]
    bench.run()
    assert not kept[0].exists()


@pytest.mark.parametrize("error", [LeaseLost("somebody else has it"), NotFound("the run was deleted")])
def test_a_lost_lease_is_dropped_and_the_next_task_taken(bench: Bench, error: CbtmError) -> None:
    bench.coordinator.leases = [lease_of("task_1"), lease_of("task_2")]
    bench.scripts = [raises(error), gives(Outcome.FINISHED)]
    assert bench.run() == 1
    assert bench.released() == [("FINISHED", "")]
    assert f"dropped cluster 3 of web: {error.message}" in bench.said


def test_a_transfer_broken_off_by_a_lost_lease_counts_as_that(bench: Bench) -> None:
    bench.coordinator.leases = [lease_of("task_1")]

    def run(heartbeat: Heartbeat) -> Outcome:
        bench.coordinator.errors["RenewLease"] = [LeaseLost("it expired")]
        heartbeat.beat()
        raise Cancelled("the download was cancelled")

    bench.scripts = [run]
    bench.run()
    assert bench.released() == []
    assert "dropped cluster 3 of web: it expired" in bench.said


def test_a_volunteer_who_leaves_gives_the_task_back(bench: Bench) -> None:
    bench.coordinator.leases = [lease_of("task_1"), lease_of("task_2")]

    def run(heartbeat: Heartbeat) -> Outcome:
        bench.stop.set()
        return Outcome.STOPPED

    bench.scripts = [run]
    assert bench.run() == 0
    assert bench.released() == [("PREEMPTED", "the volunteer stopped the worker")]
    assert len(bench.coordinator.requests("AcquireLease")) == 1
    assert "saved and gave back cluster 3 of web" in bench.said


def test_a_coordinator_that_wants_the_task_back_gets_it_with_its_own_reason(bench: Bench) -> None:
    bench.coordinator.leases = [lease_of("task_1")]
    bench.coordinator.directive = ws.DIRECTIVE_STOP
    bench.coordinator.directive_reason = "its owner paused the run"

    def run(heartbeat: Heartbeat) -> Outcome:
        heartbeat.beat()
        return Outcome.STOPPED

    bench.scripts = [run]
    bench.run()
    assert bench.released() == [("PREEMPTED", "its owner paused the run")]


def test_who_leaves_while_the_coordinator_is_away_goes_on_with_the_lease_next_time(bench: Bench) -> None:
    bench.coordinator.leases = [lease_of("task_1")]

    def leave(heartbeat: Heartbeat) -> Outcome:
        bench.stop.set()
        return Outcome.KEPT

    bench.scripts = [leave]
    assert bench.run() == 0
    assert bench.released() == []
    assert "is kept here: join again to go on" in bench.said

    bench.stop.clear()
    bench.scripts = [gives(Outcome.FINISHED)]
    assert bench.run() == 1
    assert bench.continued == [False, True]
    assert "going on with the task of the former process" in bench.said
    assert bench.released() == [("FINISHED", "")]


@pytest.mark.parametrize("error", [LeaseLost("it expired"), NotFound("deleted"), PermissionDenied("another worker's")])
def test_a_former_processs_lease_that_is_over_is_forgotten(bench: Bench, error: CbtmError) -> None:
    bench.coordinator.leases = [lease_of("task_1")]

    def leave(heartbeat: Heartbeat) -> Outcome:
        bench.stop.set()
        return Outcome.KEPT

    bench.scripts = [leave]
    bench.run()
    bench.stop.clear()
    bench.coordinator.errors["RenewLease"] = [error]
    bench.coordinator.leases = [lease_of("task_1")]
    bench.scripts = [gives(Outcome.FINISHED)]
    assert bench.run() == 1
    assert bench.continued == [False, False]


def test_a_lease_that_cannot_be_given_back_ends_by_itself(bench: Bench) -> None:
    bench.coordinator.leases = [lease_of("task_1"), lease_of("task_2")]
    bench.coordinator.errors["ReleaseLease"] = [Unavailable("away")]
    bench.scripts = [gives(Outcome.FINISHED)] * 2
    assert bench.run() == 2
    assert "could not be given back (away); it ends by itself" in bench.said
    assert bench.continued == [False, False]
