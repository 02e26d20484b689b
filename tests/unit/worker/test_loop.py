"""The worker's loop: signing in, taking tasks, and what is told of a task that ended early."""

from __future__ import annotations

import io
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import (
    CheckpointRejected,
    IntegrityError,
    InternalError,
    InvalidArgument,
    LeaseLost,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from cbtm_common.keys import public_key_of
from cbtm_common.protos import duration
from cbtm_worker import loop as module
from cbtm_worker.config import WorkerConfig
from cbtm_worker.display import Display
from cbtm_worker.identity import Identity, take_slot
from cbtm_worker.inputs import Unfit
from cbtm_worker.loop import Worker
from cbtm_worker.task import Outcome
from cbtm_worker.train import OutOfDeviceMemory, Shard
from tests.support.fake_coordinator import FakeConnection


def lease(number: int) -> ws.AcquireLeaseResponse:
    return ws.AcquireLeaseResponse(
        lease=pb.Lease(id=f"lease_{number}", epoch=number),
        spec=ws.TaskSpec(
            task=pb.Task(id=f"task_{number}", kind=pb.TASK_KIND_EXPERT, cluster_index=number, total_steps=9),
            run=pb.Run(name="demo"),
            policy=pb.LeasePolicy(
                lease_duration=duration(timedelta(hours=1)), renew_interval=duration(timedelta(hours=1))
            ),
        ),
    )


class Place:
    """One machine: its slot, a coordinator, and how each task ends (an Outcome, or what it raises)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.connection = FakeConnection()
        self.ends: list[Any] = []
        self.trained: list[tuple[str, bool]] = []
        self.stop = threading.Event()
        self.out = io.StringIO()

    def run(self, **options: Any) -> int:
        values: dict[str, Any] = {"token": "join", "until_idle": True, **options}
        config = WorkerConfig(coordinator="fake:1", cache_dir=self.folder, name="me", **values)
        slot = take_slot(self.folder, "fake:1")
        display = Display(Console(file=self.out, width=200))
        nothing: Any = None
        connection: Any = self.connection
        try:
            return Worker(config, self.stop, display, slot, connection, nothing, nothing, ("cpu",)).run()
        finally:
            slot.release()

    def identity(self) -> Identity:
        """The one that is kept."""
        slot = take_slot(self.folder, "fake:1")
        kept = slot.load()
        slot.release()
        assert kept is not None
        return kept

    @property
    def said(self) -> str:
        return self.out.getvalue()

    @property
    def lease_file(self) -> Path:
        (directory,) = (self.folder / "workers").iterdir()
        return directory / "lease"

    @property
    def released(self) -> list[tuple[str, str]]:
        return [
            (ws.ReleaseReason.Name(r.release_reason).removeprefix("RELEASE_REASON_"), r.detail)
            for r in self.connection.requests("ReleaseLease")
        ]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    made = Place(tmp_path)

    class Runner:
        def __init__(self, context: Any, held: Any, spec: Any, heartbeat: Any, *, continued: bool) -> None:
            made.trained.append((spec.task.id, continued))

        def run(self) -> Outcome:
            end = made.ends.pop(0) if made.ends else Outcome.FINISHED
            if isinstance(end, BaseException):
                raise end
            assert isinstance(end, Outcome)
            return end

    monkeypatch.setattr(module, "TaskRunner", Runner)
    monkeypatch.setattr(module, "describe", lambda device, folder: pb.Hardware(device_name="a machine"))
    monkeypatch.setattr(module, "_OUTAGE_WAIT", 0.001)
    monkeypatch.setattr(module, "_FULL_DISK_WAIT", 0.001)
    return made


def test_tasks_are_done_one_after_the_other_until_none_is_left(place: Place) -> None:
    place.connection.answers["AcquireLease"] += [lease(1), lease(2)]
    assert place.run() == 2
    assert place.trained == [("task_1", False), ("task_2", False)]
    assert place.released == [("FINISHED", "")] * 2
    assert place.said.splitlines() == [
        "joined fake:1 as me (worker_1)",
        "training on cpu (a machine)",
        "took cluster 1 of demo, from the start",
        "finished cluster 1 of demo",
        "took cluster 2 of demo, from the start",
        "finished cluster 2 of demo",
        "leaving: there is no work left",
        "left with 2 task(s) finished; thank you",
    ]


def test_one_device_has_nobody_to_share_a_model_with(tmp_path: Path) -> None:
    config = WorkerConfig(coordinator="fake:1", token="join", cache_dir=tmp_path, device="cpu", shard=Shard.ALWAYS)
    with pytest.raises(InvalidArgument, match="name several with --device, without --per-gpu") as caught:
        module.join(config, threading.Event(), Display(Console(file=io.StringIO())))
    assert caught.value.field == "shard"


def test_no_more_tasks_are_taken_than_were_offered(place: Place) -> None:
    place.connection.answers["AcquireLease"] += [lease(1), lease(2)]
    assert place.run(max_tasks=1) == 1
    assert place.trained == [("task_1", False)]


def test_the_machine_joins_once_and_is_known_afterwards(place: Place) -> None:
    place.run()
    place.run(token=None)
    assert len(place.connection.requests("Register")) == 1
    assert place.identity().worker_id == "worker_1"


def test_without_a_token_the_first_time_it_is_said_what_to_pass(place: Place) -> None:
    with pytest.raises(Unauthenticated, match="pass --token"):
        place.run(token=None)


def test_a_coordinator_that_forgot_this_worker_is_joined_anew_once(place: Place) -> None:
    place.run()
    place.connection.answers["AcquireLease"].append(Unauthenticated("who are you?"))
    place.run()
    assert len(place.connection.requests("Register")) == 2
    assert place.identity().worker_id == "worker_2"
    place.connection.answers["AcquireLease"] += [Unauthenticated("who are you?")] * 2
    with pytest.raises(Unauthenticated):
        place.run()


def test_a_worker_that_was_revoked_leaves_and_does_not_join_anew(place: Place) -> None:
    place.connection.answers["AcquireLease"].append(PermissionDenied("revoked: odd numbers"))
    with pytest.raises(PermissionDenied, match="odd numbers"):
        place.run()
    assert len(place.connection.requests("Register")) == 1


@pytest.mark.parametrize("error", [Unavailable("away"), InternalError("a defect"), ResourceExhausted("busy")])
def test_a_coordinator_that_is_away_is_asked_again_with_the_same_request_id(place: Place, error: Exception) -> None:
    place.connection.answers["AcquireLease"] += [error, error, lease(1)]
    assert place.run() == 1
    ids = [request.request_id for request in place.connection.requests("AcquireLease")]
    assert len(set(ids[:3])) == 1
    assert ids[3] != ids[0]
    assert place.said.count("cannot be asked for work") == 1


def test_waiting_for_work_is_said_once(place: Place) -> None:
    wait = ws.AcquireLeaseResponse(reason="2 task(s) are taken", retry_after=duration(timedelta(milliseconds=1)))
    place.connection.answers["AcquireLease"] += [wait, wait, wait, lease(1)]
    assert place.run() == 1
    assert place.said.count("waiting for work: 2 task(s) are taken") == 1


def test_a_lost_lease_is_dropped_with_the_reason_and_the_next_is_taken(place: Place) -> None:
    place.connection.answers["AcquireLease"] += [lease(1), lease(2)]
    place.ends += [LeaseLost("it is REVOKED: its owner put it back")]
    assert place.run() == 1
    assert "dropped cluster 1 of demo: it is REVOKED: its owner put it back" in place.said
    assert [r.lease_id for r in place.connection.requests("ReleaseLease")] == ["lease_2"]
    assert not place.lease_file.exists()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (IntegrityError("shard 3 is damaged"), "FAILED"),
        (CheckpointRejected("model: finite: found NaN"), "FAILED"),
        (RuntimeError("CUDA error"), "FAILED"),
        (OutOfDeviceMemory("needs 90 GiB"), "UNFIT"),
        (Unfit("the disk is too small"), "UNFIT"),
        (ResourceExhausted("the disk is full"), "PREEMPTED"),
    ],
)
def test_a_task_that_cannot_go_on_here_is_given_back_with_the_reason(place: Place, error: Exception, told: str) -> None:
    place.connection.answers["AcquireLease"] += [lease(1), lease(2)]
    place.ends.append(error)
    assert place.run() == 1
    (reason, detail), finished = place.released
    assert reason == told
    assert str(error) in detail
    assert finished == ("FINISHED", "")
    assert f"cannot go on with cluster 1 of demo: {detail}" in place.said


def test_rejected_work_is_dropped_and_not_sent_again_though_its_lease_ended_with_it(place: Place) -> None:
    place.run()
    saved = place.lease_file.parent / "tasks" / "task_1" / "s0000000003"
    saved.mkdir(parents=True)
    place.connection.answers["AcquireLease"] += [lease(1), lease(2)]
    place.connection.answers["ReleaseLease"].append(LeaseLost("it is REVOKED: NaN"))
    place.ends.append(CheckpointRejected("model: finite: found NaN"))
    assert place.run() == 1
    assert "cannot go on with cluster 1 of demo: model: finite: found NaN" in place.said
    assert "could not be given back" not in place.said
    assert not saved.exists()


def test_a_task_saved_before_its_end_is_given_back_for_somebody_else(place: Place) -> None:
    place.connection.answers["AcquireLease"].append(lease(1))
    place.ends.append(Outcome.STOPPED)
    assert place.run() == 0
    assert place.released == [("PREEMPTED", "the volunteer stopped the worker")]
    assert "saved and gave back cluster 1 of demo" in place.said


def test_a_task_kept_while_the_coordinator_is_away_is_gone_on_with_by_the_next_process(place: Place) -> None:
    place.connection.answers["AcquireLease"].append(lease(1))
    place.ends.append(Outcome.KEPT)
    place.run(max_tasks=1, until_idle=True)
    assert place.trained[:1] == [("task_1", False)]
    assert ("task_1", True) in place.trained
    assert place.released == [("FINISHED", "")]


def test_a_lease_of_a_former_process_that_is_over_is_forgotten(place: Place) -> None:
    place.run()
    place.lease_file.write_bytes(_stored(lease(7)))
    place.connection.answers["RenewLease"].append(LeaseLost("it is EXPIRED"))
    place.run()
    assert place.trained == []
    assert not place.lease_file.exists()


@pytest.mark.parametrize("content", [b"", b"!!!!", b"AAAA", b"\xff\xfe"])
def test_a_damaged_note_of_a_lease_is_forgotten(place: Place, content: bytes) -> None:
    place.run()
    place.lease_file.write_bytes(content)
    place.connection.answers["RenewLease"].append(LeaseLost("there is no such lease"))
    assert place.run() == 0
    assert not place.lease_file.exists()


def test_a_release_that_cannot_be_told_does_not_end_the_worker(place: Place) -> None:
    place.connection.answers["AcquireLease"] += [lease(1), lease(2)]
    place.connection.answers["ReleaseLease"].append(Unavailable("away"))
    assert place.run() == 2
    assert "the lease could not be given back (away); it ends by itself" in place.said


def test_asked_to_stop_it_takes_nothing_more(place: Place) -> None:
    place.connection.answers["AcquireLease"].append(lease(1))
    place.stop.set()
    assert place.run() == 0
    assert place.trained == []


def test_an_identity_is_kept_in_the_slot(place: Place) -> None:
    place.run()
    (request,) = place.connection.requests("Register")
    kept = place.identity()
    assert kept.worker_id == "worker_1"
    assert public_key_of(bytes.fromhex(kept.private_key)) == request.public_key
    assert kept.private_key not in str(place.connection.calls)


def _stored(answer: ws.AcquireLeaseResponse) -> bytes:
    from base64 import b64encode

    return b64encode(answer.SerializeToString())
