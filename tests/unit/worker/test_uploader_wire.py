"""The uploader over real gRPC and HTTP messages: what is sent again after a failure, and what a full disk costs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import cbtm_worker.train
from cbtm_common.errors import LeaseLost, ResourceExhausted
from cbtm_common.rpc import RetryPolicy
from cbtm_worker import sender
from cbtm_worker import uploader as module
from cbtm_worker.heartbeat import Heartbeat
from cbtm_worker.local import LocalCheckpoints
from cbtm_worker.session import Held, Session
from cbtm_worker.uploader import Uploader
from tests.support.scripted_coordinator import POLICY, ScriptedCoordinator

HELD = Held(lease_id="lease_1", epoch=7)


class Desk:
    """An uploader, and a writer of checkpoints of two files that needs no torch.

    `full` is how many of the next writes find the disk full; `refused` is set by the last of them.
    """

    def __init__(self, folder: Path, coordinator: ScriptedCoordinator, session: Session) -> None:
        self.folder = folder
        self.coordinator = coordinator
        self.heartbeat = Heartbeat(session, HELD, POLICY)
        self.local = LocalCheckpoints(folder)
        self.said: list[str] = []
        self.rooms = 0
        self.full = 0
        self.refused = threading.Event()
        self._session = session
        self._transfer = coordinator.transfer()
        self.uploader = self.open()

    def open(self) -> Uploader:
        return Uploader(
            self._session, HELD, self.heartbeat, self._transfer, self.folder, say=self.said.append, make_room=self._room
        )

    def close(self) -> None:
        self.uploader.close(abandon=True)
        self._transfer.close()

    def _room(self) -> None:
        self.rooms += 1

    def write(self, snapshot: Any, directory: Path, *, final: bool) -> None:
        if self.full:
            self.full -= 1
            if not self.full:
                self.refused.set()
            raise ResourceExhausted("the disk is full")
        temporary = directory.with_name(f".{directory.name}.partial")
        (temporary / "model").mkdir(parents=True)
        (temporary / "model" / "model.safetensors").write_bytes(f"weights of {snapshot}".encode())
        (temporary / "state.json").write_text(f"state of {snapshot}")
        temporary.rename(directory)

    def submit(self, step: int, **options: Any) -> None:
        snapshot: Any = f"step {step}"
        self.uploader.submit(snapshot, step=step, final=False, metrics={"loss": 1.5}, **options)

    def on_disk(self) -> list[tuple[int, bool]]:
        return [(c.step, c.committed) for c in self.local.all()]


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr(sender, "_BACKOFF", RetryPolicy(attempts=1, initial=0.01, maximum=0.01))
    monkeypatch.setattr(module, "_FULL_DISK_SECONDS", 0.01)
    with ScriptedCoordinator() as coordinator, coordinator.connect() as connection:
        made = Desk(tmp_path / "task_1", coordinator, Session(connection))
        monkeypatch.setitem(cbtm_worker.train.__dict__, "write_checkpoint", made.write)
        yield made
        made.close()


def test_every_message_carries_the_lease_and_the_bytes_are_counted(desk: Desk) -> None:
    seen: list[tuple[int, int]] = []

    def look(request: httpx.Request) -> None:
        sending = desk.uploader.sending
        assert sending is not None
        seen.append((sending.step, sending.total_bytes))

    desk.coordinator.store_fault = look
    desk.submit(10)
    assert desk.uploader.flush()
    (prepared,) = desk.coordinator.requests("PrepareUpload")
    (committed,) = desk.coordinator.requests("CommitCheckpoint")
    assert (prepared.lease_id, prepared.epoch, prepared.step) == ("lease_1", 7, 10)
    assert (committed.lease_id, committed.epoch, committed.metrics["loss"]) == ("lease_1", 7, 1.5)
    size = len("weights of step 10") + len("state of step 10")
    assert seen == [(10, size)] * 2
    assert desk.heartbeat.progress.transferred_bytes == size
    assert desk.uploader.sending is None


def test_after_a_broken_link_only_what_is_missing_is_sent(desk: Desk) -> None:
    faults = iter([None, httpx.Response(403, text="expired")])
    desk.coordinator.store_fault = lambda request: next(faults, None)
    desk.submit(10)
    assert desk.uploader.flush()
    assert sorted(desk.coordinator.puts) == ["s10/model/model.safetensors", "s10/state.json"]
    assert len(desk.coordinator.requests("PrepareUpload")) == 2


def test_a_restart_sends_nothing_twice_and_sweeps_up(desk: Desk) -> None:
    desk.coordinator.errors["CommitCheckpoint"] = [LeaseLost("as if the process had died here")]
    desk.submit(10)
    with pytest.raises(LeaseLost):
        desk.uploader.flush()
    desk.uploader.close(abandon=True)
    (desk.folder / ".s0000000020.0badf00d.partial").mkdir()

    desk.uploader = desk.open()
    (found,) = desk.local.all()
    desk.uploader.resume(found, {"loss": 2.0})
    assert desk.uploader.flush()

    assert len(desk.coordinator.puts) == 2
    assert desk.on_disk() == [(10, True)]
    assert not list(desk.folder.glob(".*"))


def test_leaving_with_nothing_new_breaks_off_what_is_older_than_what_waits(desk: Desk) -> None:
    sending = threading.Event()

    def slow(request: httpx.Request) -> httpx.Response | None:
        if not request.url.path.startswith("/s10/"):
            return None
        sending.set()
        return httpx.Response(503)

    desk.coordinator.store_fault = slow
    desk.submit(10)
    assert sending.wait(5)
    desk.submit(20)
    desk.uploader.skip_older()
    assert desk.uploader.flush()
    assert [r.checkpoint_id for r in desk.coordinator.requests("CommitCheckpoint")] == ["ckpt_20"]


def test_a_full_store_is_waited_for(desk: Desk) -> None:
    answers = iter([httpx.Response(507), httpx.Response(507)])
    desk.coordinator.store_fault = lambda request: next(answers, None)
    desk.submit(10)
    assert desk.uploader.flush()


def test_a_full_disk_is_cleared_of_other_tasks_before_its_owner_is_troubled(desk: Desk) -> None:
    desk.full = 1
    desk.submit(10)
    assert desk.uploader.flush()
    assert (desk.rooms, desk.said) == (1, [])
    desk.full = 4
    desk.submit(20)
    assert desk.uploader.flush()
    assert desk.rooms == 2
    assert desk.said == ["the checkpoint of step 20 waits for room: the disk is full"]


def test_a_snapshot_that_waits_for_room_gives_way_to_a_newer_one(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FULL_DISK_SECONDS", 30.0)
    desk.full = 2
    desk.submit(10)
    assert desk.refused.wait(5)
    desk.submit(20)
    assert desk.uploader.flush()
    assert desk.on_disk() == [(20, True)]


def test_a_heartbeat_that_ends_ends_an_upload_that_waits(desk: Desk) -> None:
    desk.coordinator.store_fault = lambda request: httpx.Response(503)
    desk.submit(10)
    desk.coordinator.wait_for("PrepareUpload")
    desk.coordinator.errors["RenewLease"] = [LeaseLost("expired")]
    desk.heartbeat.beat()
    with pytest.raises(LeaseLost, match="expired"):
        desk.uploader.flush()


def test_closing_waits_for_what_is_under_way(desk: Desk) -> None:
    desk.submit(10)
    desk.uploader.close()
    assert desk.on_disk() == [(10, True)]
