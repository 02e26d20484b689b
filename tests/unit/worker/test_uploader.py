"""The uploader, against a coordinator and a store that answer what a test says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

import cbtm_worker.train
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import IntegrityError, LeaseLost, ResourceExhausted, Unavailable
from cbtm_common.protos import duration
from cbtm_common.rpc import RetryPolicy
from cbtm_common.transfer import UrlExpired
from cbtm_worker import sender
from cbtm_worker import uploader as module
from cbtm_worker.heartbeat import Heartbeat
from cbtm_worker.local import LocalCheckpoints
from cbtm_worker.uploader import Uploader
from tests.support.fake_coordinator import HELD, FakeSession, FakeTransfer


class Bench:
    """An uploader with its surroundings; a snapshot is any string, and what is written is that string."""

    def __init__(self, folder: Path) -> None:
        self.session, self.transfer = FakeSession(), FakeTransfer()
        policy = pb.LeasePolicy(
            lease_duration=duration(timedelta(hours=1)), renew_interval=duration(timedelta(hours=1))
        )
        self.heartbeat = Heartbeat(self.session, HELD, policy)  # type: ignore[arg-type]
        self.local = LocalCheckpoints(folder)
        self.writes: list[Any] = []
        self.said: list[str] = []
        self.room_made = 0
        self.uploader = self.start()

    def start(self) -> Uploader:
        return Uploader(
            self.session,  # type: ignore[arg-type]
            HELD,
            self.heartbeat,
            self.transfer,  # type: ignore[arg-type]
            self.local.folder,
            say=self.said.append,
            make_room=self.make_room,
        )

    def make_room(self) -> None:
        self.room_made += 1

    def write(self, snapshot: Any, directory: Path, *, final: bool) -> None:
        """Stands for `write_checkpoint`."""
        queued = self.writes.pop(0) if self.writes else None
        if isinstance(queued, BaseException):
            raise queued
        directory.mkdir(parents=True)
        (directory / "state.json").write_text(f"{snapshot} {final}")
        (directory / "weights").write_text(snapshot)

    def submit(self, step: int, *, final: bool = False, last: bool = False, patient: bool = True) -> None:
        self.uploader.submit(
            f"weights {step}",  # type: ignore[arg-type]
            step=step,
            final=final,
            metrics={"loss": 1.0},
            last=last or final,
            patient=patient,
        )

    @property
    def steps_here(self) -> list[int]:
        return [checkpoint.step for checkpoint in self.local.all()]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(sender, "_BACKOFF", RetryPolicy(attempts=1, initial=0.001, maximum=0.002))
    monkeypatch.setattr(module, "_FULL_DISK_SECONDS", 0.001)
    made = Bench(tmp_path / "task")
    # Into the dictionary: an attribute that is not there yet would import torch.
    monkeypatch.setitem(cbtm_worker.train.__dict__, "write_checkpoint", made.write)
    yield made
    made.uploader.close(abandon=True)


class Gate:
    """An upload that stops in its middle until the test lets it go on, or it is cancelled."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.cancelled = False

    def __call__(self, cancelled: threading.Event | None) -> None:
        self.reached.set()
        while not self.opened.wait(0.01):
            if cancelled is not None and cancelled.is_set():
                self.cancelled = True
                from cbtm_common.errors import Cancelled

                raise Cancelled("cancelled")


def test_a_checkpoint_is_written_sent_and_committed(bench: Bench) -> None:
    bench.submit(5)
    assert bench.uploader.flush()
    assert bench.transfer.sent == ["state.json", "weights"]
    assert bench.session.committed == [5]
    assert bench.uploader.committed_step == 5
    assert bench.local.committed_step == 5
    assert bench.heartbeat.progress.committed_step == 5
    assert bench.heartbeat.progress.transferred_bytes > 0


def test_the_newest_committed_one_stays_and_older_ones_go(bench: Bench) -> None:
    for step in (5, 10, 15):
        bench.submit(step)
        bench.uploader.flush()
    bench.uploader.close(abandon=False)
    assert bench.session.committed == [5, 10, 15]
    assert bench.steps_here == [15]


def test_the_size_of_checkpoints_and_the_speed_of_the_link_are_measured(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that the first bytes count already; elapsed time is real, and at least some microseconds.
    monkeypatch.setattr(sender, "_RATE_SECONDS", 0.0)
    bench.submit(5)
    assert bench.uploader.flush()
    told = bench.heartbeat.progress
    assert told.checkpoint_bytes == sum(path.stat().st_size for path in bench.local.path(5).iterdir())
    assert told.upload_bytes_per_second > 0


def test_what_waits_is_dropped_for_what_is_newer(bench: Bench) -> None:
    gate = Gate()
    bench.transfer.answers.append(gate)
    bench.submit(5)
    assert gate.reached.wait(10)
    for step in (10, 15, 20):
        bench.submit(step)
    gate.opened.set()
    bench.uploader.flush()
    assert bench.session.committed[0] == 5
    assert bench.session.committed[-1] == 20
    assert 20 in bench.steps_here


def test_a_link_that_is_down_keeps_nothing_off_the_disk(bench: Bench) -> None:
    gate = Gate()
    bench.transfer.answers.append(gate)
    bench.submit(5)
    assert gate.reached.wait(10)
    bench.submit(10)
    wait_until(lambda: 10 in bench.steps_here and not bench.uploader.is_writing)
    assert bench.session.committed == []
    gate.opened.set()
    bench.uploader.flush()
    assert bench.session.committed == [5, 10]


def test_the_last_checkpoint_breaks_off_an_older_upload(bench: Bench) -> None:
    gate = Gate()
    bench.transfer.answers.append(gate)
    bench.submit(5)
    assert gate.reached.wait(10)
    bench.submit(10, final=True)
    bench.uploader.flush()
    assert gate.cancelled
    assert bench.session.committed == [10]


@pytest.mark.parametrize("error", [Unavailable("away"), UrlExpired("too late"), IntegrityError("other bytes")])
@pytest.mark.parametrize("method", ["prepare_upload", "commit", "upload"])
def test_what_may_pass_is_tried_again_from_the_preparation_on(bench: Bench, error: Exception, method: str) -> None:
    queue = bench.transfer.answers if method == "upload" else bench.session.answers[method]
    queue += [error, error]
    bench.submit(5)
    bench.uploader.flush()
    assert bench.session.committed == [5]
    assert bench.session.arguments("prepare_upload") == [5, 5, 5]


def test_bytes_that_stay_wrong_are_given_up(bench: Bench) -> None:
    bench.session.answers["commit"] += [IntegrityError("other bytes")] * 9
    bench.submit(5)
    with pytest.raises(IntegrityError, match="other bytes"):
        bench.uploader.flush()
    assert len(bench.session.arguments("commit")) == 3
    with pytest.raises(IntegrityError):
        bench.uploader.check()
    with pytest.raises(IntegrityError):
        bench.submit(10)


def test_a_commit_that_takes_long_is_asked_for_again_with_the_same_request_id(bench: Bench) -> None:
    bench.session.answers["commit"] += [
        ws.CommitCheckpointResponse(
            checkpoint=pb.Checkpoint(state=pb.CHECKPOINT_STATE_UPLOADING),
            retry_after=duration(timedelta(milliseconds=1)),
        )
    ] * 3
    bench.submit(5)
    bench.uploader.flush()
    assert len(set(bench.session.arguments("commit"))) == 1
    assert len(bench.session.arguments("commit")) == 4
    assert bench.session.arguments("prepare_upload") == [5]


def test_only_what_brings_a_checkpoint_nearer_to_its_commit_counts_as_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "_BACKOFF", RetryPolicy(attempts=1, initial=0.001, maximum=0.002))
    (tmp_path / "weights").write_bytes(b"12345678")
    session = FakeSession()
    now = 0.0
    seen: list[tuple[str, float]] = []

    def at(time: float, what: str, action: Callable[[], object]) -> None:
        nonlocal now
        now = time
        action()
        seen.append((what, sends.advanced))

    class Link:
        """Breaks once, after five of eight bytes."""

        times = iter((10.0, 30.0))

        def upload(self, upload: pb.Upload, path: Path, *, on_bytes: Callable[[int], None], cancelled: object) -> None:
            begun = next(self.times)
            at(begun, "five bytes", lambda: on_bytes(5))
            if begun == 10.0:
                raise Unavailable("broken")
            at(40.0, "the rest", lambda: on_bytes(3))

    heartbeat = Heartbeat(session, HELD, pb.LeasePolicy())  # type: ignore[arg-type]
    sends = sender.Sender(session, HELD, heartbeat, Link(), clock=lambda: now)  # type: ignore[arg-type]
    assert sends.send(tmp_path, step=5, metrics={}, cancelled=threading.Event(), is_needless=lambda: False)
    assert seen == [("five bytes", 10.0), ("five bytes", 10.0), ("the rest", 40.0)]


def test_a_check_that_the_coordinator_says_goes_on_counts_as_going_on(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"12345678")
    times = iter(range(1_000))
    seen: list[float] = []

    class Session(FakeSession):
        def commit(self, *arguments: Any) -> ws.CommitCheckpointResponse:
            seen.append(sends.advanced)
            return super().commit(*arguments)

    session = Session()
    session.answers["commit"].append(
        ws.CommitCheckpointResponse(checkpoint=pb.Checkpoint(state=pb.CHECKPOINT_STATE_UPLOADING))
    )
    heartbeat = Heartbeat(session, HELD, pb.LeasePolicy())  # type: ignore[arg-type]
    sends = sender.Sender(session, HELD, heartbeat, FakeTransfer(), clock=lambda: next(times))  # type: ignore[arg-type]
    assert sends.send(tmp_path, step=5, metrics={}, cancelled=threading.Event(), is_needless=lambda: False)
    before, after = seen
    assert before < after


def test_a_lost_lease_ends_it_at_once_and_leaves_the_checkpoint_on_disk(bench: Bench) -> None:
    gate = Gate()
    bench.transfer.answers.append(gate)
    bench.submit(5)
    assert gate.reached.wait(10)
    bench.session.answers["renew"].append(LeaseLost("it is REVOKED"))
    bench.heartbeat.beat()
    with pytest.raises(LeaseLost, match="REVOKED"):
        bench.uploader.flush()
    assert gate.cancelled
    assert bench.steps_here == [5]
    assert bench.local.committed_step == 0


def test_what_a_former_process_left_is_sent(bench: Bench) -> None:
    bench.write("weights 8", bench.local.path(8), final=False)
    (checkpoint,) = bench.local.all()
    bench.uploader.resume(checkpoint, {"loss": 2.0})
    bench.uploader.flush()
    assert bench.session.committed == [8]


def test_files_that_are_stored_already_are_left_to_the_transfer_and_committed(bench: Bench) -> None:
    bench.session.answers["prepare_upload"].append(
        ws.PrepareUploadResponse(checkpoint=pb.Checkpoint(id="ckpt_5", step=5), uploads=[])
    )
    bench.submit(5)
    bench.uploader.flush()
    assert bench.transfer.sent == []
    assert bench.session.committed == [5]


def test_a_full_disk_is_said_and_waited_for(bench: Bench) -> None:
    bench.writes += [ResourceExhausted("the disk is full")] * 3
    bench.submit(5)
    bench.uploader.flush()
    assert bench.session.committed == [5]
    assert bench.room_made == 1
    assert bench.said == ["the checkpoint of step 5 waits for room: the disk is full"]


def test_a_full_disk_is_an_error_to_who_wants_to_leave(bench: Bench) -> None:
    bench.writes += [ResourceExhausted("the disk is full")] * 3
    bench.submit(5, last=True, patient=False)
    with pytest.raises(ResourceExhausted):
        bench.uploader.flush()


def test_an_error_of_writing_reaches_who_trains(bench: Bench) -> None:
    bench.writes.append(PermissionError("read-only"))
    bench.submit(5)
    with pytest.raises(PermissionError):
        bench.uploader.flush()


def test_who_leaves_does_not_wait_for_a_coordinator_that_is_away(bench: Bench) -> None:
    gate = Gate()
    bench.transfer.answers.append(gate)
    bench.submit(5, last=True)
    assert not bench.uploader.flush(give_up=lambda: True)
    assert bench.steps_here == [5]
    bench.uploader.close(abandon=True)
    assert bench.session.committed == []


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not happen within 10 s")
