"""Writes and uploads checkpoints on two threads of its own, while training goes on.

One thread writes snapshots to this disk, where the folder is the queue (`cbtm_worker.local`); the other sends the
newest until it is committed (`cbtm_worker.sender`). A slow or broken link thus never keeps a checkpoint off the disk.
The newest makes older ones needless: one that waits is dropped, and one that is under way is broken off when the task
ends or leaves. The last committed checkpoint stays until a newer one is committed. A full disk is said and waited for.

Not guaranteed: that everything submitted is committed; `flush` tells.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cbtm_common.errors import ResourceExhausted
from cbtm_common.faults import point
from cbtm_common.protos import JsonValue
from cbtm_common.transfer import Transfer
from cbtm_worker.background import give_way
from cbtm_worker.heartbeat import Heartbeat
from cbtm_worker.local import LocalCheckpoint, LocalCheckpoints
from cbtm_worker.sender import Sender, Sending
from cbtm_worker.session import Held, Session
from cbtm_worker.waiting import AnyOf

if TYPE_CHECKING:
    from cbtm_worker.train import Snapshot

_log = logging.getLogger(__name__)
_FULL_DISK_SECONDS = 15.0
# While `flush` waits, it calls `tick` so often.
_TICK_SECONDS = 0.25


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    step: int
    final: bool
    snapshot: Snapshot
    metrics: dict[str, JsonValue]
    # Waits for room on a full disk.
    patient: bool


@dataclass(frozen=True, kw_only=True)
class _Upload:
    step: int
    metrics: dict[str, JsonValue]


class Uploader:
    """Takes care of the checkpoints of one task, in its `folder`, under one lease. `say` tells the volunteer.

    `make_room` is called once when the disk is full, before waiting for its owner.
    """

    def __init__(
        self,
        session: Session,
        held: Held,
        heartbeat: Heartbeat,
        transfer: Transfer,
        folder: Path,
        *,
        say: Callable[[str], None] = _log.warning,
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        self._heartbeat = heartbeat
        self._sender = Sender(session, held, heartbeat, transfer)
        self._local = LocalCheckpoints(folder)
        self._say = say
        self._make_room = make_room
        self._condition = threading.Condition()
        self._to_write: _Snapshot | None = None
        self._writing = False
        self._to_send: _Upload | None = None
        self._sending: _Upload | None = None
        self._closed = False
        self._error: BaseException | None = None
        # Nothing comes after `newest_step`.
        self._last = False
        # Set while what is on its way is older than that.
        self._superseded = threading.Event()
        self._abandoned = threading.Event()
        # When something was last queued for the sender.
        self._queued = time.monotonic()
        self.committed_step = self._local.committed_step
        # The last that was submitted or resumed.
        self.newest_step = self.committed_step
        folder.mkdir(parents=True, exist_ok=True)
        self._local.sweep()
        self._threads = [
            threading.Thread(target=self._run, args=(self._write_next,), name="checkpoint-writer", daemon=True),
            threading.Thread(target=self._run, args=(self._send_next,), name="checkpoint-sender", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_writing(self) -> bool:
        """Whether a snapshot is on its way to the disk: another now would only take memory."""
        with self._condition:
            return self._writing or self._to_write is not None

    @property
    def sending(self) -> Sending | None:
        """What is on its way to the store, if anything is."""
        return self._sender.sending

    @property
    def stalled_seconds(self) -> float:
        """Since what is to be committed last came nearer to it."""
        return time.monotonic() - max(self._queued, self._sender.advanced)

    def submit(
        self,
        snapshot: Snapshot,
        *,
        step: int,
        final: bool,
        metrics: dict[str, JsonValue],
        last: bool = False,
        patient: bool = True,
    ) -> None:
        """Queues a snapshot; an older one that waits is dropped. Raises what went wrong before, if something did.

        With `last`, nothing comes after it: an older upload under way is broken off. Not `patient`, a full disk is an
        error, ResourceExhausted, instead of a wait.
        """
        with self._condition:
            self._raise_error()
            self._to_write = _Snapshot(step=step, final=final, snapshot=snapshot, metrics=metrics, patient=patient)
            self.newest_step = step
            if last:
                self._to_send = None
                self._skip_older()
            self._condition.notify_all()

    def resume(self, checkpoint: LocalCheckpoint, metrics: dict[str, JsonValue]) -> None:
        """Queues a checkpoint that a former process wrote and did not get committed."""
        with self._condition:
            self._raise_error()
            self._to_send = _Upload(step=checkpoint.step, metrics=metrics)
            self._queued = time.monotonic()
            self.newest_step = checkpoint.step
            self._condition.notify_all()

    def skip_older(self) -> None:
        """Nothing comes after what was submitted last: an older upload under way is broken off."""
        with self._condition:
            self._skip_older()

    def _skip_older(self) -> None:
        self._last = True
        self._mark_superseded()

    def _mark_superseded(self) -> None:
        if self._last and self._sending is not None and self._sending.step < self.newest_step:
            self._superseded.set()
        else:
            self._superseded.clear()

    def flush(self, *, tick: Callable[[], None] = lambda: None, give_up: Callable[[], bool] = lambda: False) -> bool:
        """Waits until all that was submitted is committed; True then. Raises what went wrong.

        False when `give_up` said so first, and everything is at least on this disk.
        """
        while True:
            with self._condition:
                settled = self._condition.wait_for(lambda: self._error is not None or self._idle(), _TICK_SECONDS)
                self._raise_error()
                if settled:
                    return True
                on_disk = not self._writing and self._to_write is None
            tick()
            if on_disk and give_up():
                return False

    def check(self) -> None:
        """Raises what went wrong in the background, if something did."""
        with self._condition:
            self._raise_error()

    def close(self, *, abandon: bool = False) -> None:
        """Ends both threads: after what is on its way, or at once with `abandon`; the folder stays valid."""
        with self._condition:
            self._closed = True
            if abandon:
                self._abandoned.set()
            self._condition.notify_all()
        for thread in self._threads:
            thread.join()

    def _idle(self) -> bool:
        return not self._writing and self._to_write is None and self._sending is None and self._to_send is None

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self, step: Callable[[], bool]) -> None:
        """A thread: `step` does the next thing, and is False when there will be no more."""
        give_way()
        try:
            while step():
                # Outside the lock: a large checkpoint takes a while to remove.
                self._prune()
        except BaseException as error:  # noqa: BLE001  # handed to the training thread
            with self._condition:
                self._settle(error)

    def _settle(self, error: BaseException | None) -> None:
        """With the lock held: tells whoever waits how the thing in hand ended."""
        if self._error is None:
            self._error = error
        self._condition.notify_all()

    def _over(self) -> bool:
        return self._error is not None or self._abandoned.is_set()

    # To the disk

    def _write_next(self) -> bool:
        with self._condition:
            self._condition.wait_for(lambda: self._closed or self._over() or self._to_write is not None)
            if self._over() or self._to_write is None:
                return False
            job, self._to_write, self._writing = self._to_write, None, True
        written, error = False, None
        try:
            written = self._write(job)
        except BaseException as caught:  # noqa: BLE001  # handed to the training thread
            error = caught
        with self._condition:
            self._writing = False
            if written:
                self._to_send = _Upload(step=job.step, metrics=job.metrics)
                self._queued = time.monotonic()
            self._settle(error)
        return error is None

    def _write(self, job: _Snapshot) -> bool:
        """Whether it is on the disk; not when a newer one came while there was no room for it."""
        from cbtm_worker.train import write_checkpoint

        tries = 0
        while True:
            try:
                write_checkpoint(job.snapshot, self._local.path(job.step), final=job.final)
            except ResourceExhausted as error:
                if tries == 0:
                    self._make_room()
                elif not job.patient:
                    raise
                elif tries == 1:
                    self._say(f"the checkpoint of step {job.step:,} waits for room: {error.message}")
                if tries and self._newer_or_over():
                    return False
                tries += 1
                continue
            point("worker.checkpoint.after_rename")
            return True

    def _newer_or_over(self) -> bool:
        """Waits for room on the disk; whether the snapshot in hand is needless by then."""
        over = AnyOf(self._heartbeat.ended, self._abandoned)
        with self._condition:
            self._condition.wait_for(lambda: self._to_write is not None or over.is_set(), _FULL_DISK_SECONDS)
            return self._to_write is not None or over.is_set()

    def _prune(self) -> None:
        with self._condition:
            needed = {s.step for s in (self._sending, self._to_send) if s is not None}
        try:
            self._local.prune(needed)
        except OSError as error:
            # It costs room, and nothing else; the next checkpoint tries again.
            _log.warning("older checkpoints are not removed: %s", error)

    # To the coordinator

    def _send_next(self) -> bool:
        with self._condition:
            self._condition.wait_for(
                lambda: (
                    self._over()
                    or self._to_send is not None
                    or (self._closed and not self._writing and self._to_write is None)
                )
            )
            if self._over() or self._to_send is None:
                return False
            self._sending = job = self._to_send
            self._to_send = None
            self._mark_superseded()
        error = None
        try:
            if self._send(job):
                self._mark_committed(job.step)
                self._heartbeat.committed(job.step)
                self.committed_step = job.step
        except BaseException as caught:  # noqa: BLE001  # handed to the training thread
            error = caught
        with self._condition:
            self._sending = None
            self._settle(error)
        return error is None

    def _mark_committed(self, step: int) -> None:
        try:
            self._local.mark_committed(step)
            point("worker.upload.after_mark")
        except OSError as error:
            # The coordinator knows, which is what counts: after a restart it says so.
            _log.warning("that step %d is committed cannot be noted: %s", step, error)

    def _send(self, job: _Upload) -> bool:
        """Whether it is committed; not when it was broken off in favour of a newer one."""
        return self._sender.send(
            self._local.path(job.step),
            step=job.step,
            metrics=job.metrics,
            cancelled=AnyOf(self._heartbeat.ended, self._abandoned, self._superseded),
            is_needless=lambda: self._newer_waits(job.step),
        )

    def _newer_waits(self, step: int) -> bool:
        with self._condition:
            return self._to_send is not None and self._to_send.step > step
