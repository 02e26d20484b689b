"""Writes and uploads checkpoints on a thread of its own, while training goes on.

    TASKS/<task id>/s<step>/        a checkpoint, whole (it was renamed into place)
    TASKS/<task id>/s<step>.done    it is committed: the coordinator has it

The folder is the queue: what is there without `.done` is still to be sent, also after a crash. The newest goes first
and makes older ones needless. Uploads go on by part after a broken link, an expired URL or a restart, for the
coordinator signs only what is missing. The last committed checkpoint is kept until a newer one is committed.
"""

from __future__ import annotations

import logging
import random
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.errors import RETRYABLE, Cancelled, CbtmError, IntegrityError
from cbtm_common.faults import point
from cbtm_common.files import FileSpec, describe
from cbtm_common.ids import new_request_id
from cbtm_common.protos import JsonValue, from_duration
from cbtm_common.rpc import RetryPolicy
from cbtm_common.transfer import Transfer, UrlExpired
from cbtm_worker.heartbeat import Heartbeat
from cbtm_worker.session import Held, Session

if TYPE_CHECKING:
    from cbtm_worker.train import Snapshot

_log = logging.getLogger(__name__)
# The coordinator found other bytes than were declared: sent again so often before the task is given up.
_WRONG_BYTES_TRIES = 3
_BACKOFF = RetryPolicy(attempts=1, initial=1.0, maximum=30.0)


@dataclass(frozen=True, kw_only=True)
class LocalCheckpoint:
    step: int
    directory: Path
    committed: bool


def local_checkpoints(folder: Path) -> list[LocalCheckpoint]:
    """Whole checkpoints of a task on this disk, the newest first."""
    found = []
    for path in folder.glob("s*"):
        if path.is_dir() and path.name[1:].isdigit():
            done = path.with_name(path.name + ".done").exists()
            found.append(LocalCheckpoint(step=int(path.name[1:]), directory=path, committed=done))
    return sorted(found, key=lambda c: -c.step)


@dataclass(frozen=True, kw_only=True)
class _Job:
    step: int
    final: bool
    snapshot: Snapshot | None
    metrics: dict[str, JsonValue]


class Uploader:
    """Uploads the checkpoints of one task under one lease. `folder` is that task's."""

    def __init__(self, session: Session, held: Held, heartbeat: Heartbeat, transfer: Transfer, folder: Path) -> None:
        self._session = session
        self._held = held
        self._heartbeat = heartbeat
        self._transfer = transfer
        self._folder = folder
        self._condition = threading.Condition()
        self._waiting: _Job | None = None
        self._busy = False
        self._closed = False
        self._error: BaseException | None = None
        self.committed_step = 0
        self._thread = threading.Thread(target=self._run, name="uploader", daemon=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written or sent: another now would only queue up."""
        with self._condition:
            return self._busy or self._waiting is not None

    def submit(self, snapshot: Snapshot, *, step: int, final: bool, metrics: dict[str, JsonValue]) -> None:
        """Queues a snapshot; an older one that waits is dropped. Raises what went wrong before, if something did."""
        self._put(_Job(step=step, final=final, snapshot=snapshot, metrics=metrics))

    def resume(self, checkpoint: LocalCheckpoint, *, final: bool) -> None:
        """Queues a checkpoint that a former process wrote and did not get committed."""
        self._put(_Job(step=checkpoint.step, final=final, snapshot=None, metrics={}))

    def _put(self, job: _Job) -> None:
        with self._condition:
            self._raise_error()
            self._waiting = job
            self._condition.notify_all()

    def flush(self) -> None:
        """Waits until all that was submitted is committed. Raises what went wrong."""
        with self._condition:
            self._condition.wait_for(lambda: self._error is not None or not (self._busy or self._waiting))
            self._raise_error()

    def check(self) -> None:
        """Raises what went wrong in the background, if something did."""
        with self._condition:
            self._raise_error()

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self._thread.join()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._closed or self._waiting is not None)
                if self._waiting is None:
                    return
                job, self._waiting, self._busy = self._waiting, None, True
            try:
                self._process(job)
            except BaseException as error:  # noqa: BLE001  # handed to the training thread
                with self._condition:
                    self._error = error
            finally:
                with self._condition:
                    self._busy = False
                    self._condition.notify_all()
            if self._error is not None:
                return

    def _process(self, job: _Job) -> None:
        directory = self._folder / f"s{job.step:010d}"
        if job.snapshot is not None:
            from cbtm_worker.train import write_checkpoint

            write_checkpoint(job.snapshot, directory, final=job.final)
        point("worker.checkpoint.after_rename")
        files = describe(directory)
        self._send_until_committed(job, directory, files)
        directory.with_name(directory.name + ".done").touch()
        self._heartbeat.committed(job.step)
        self.committed_step = job.step
        self._prune(job.step)

    def _send_until_committed(self, job: _Job, directory: Path, files: list[FileSpec]) -> None:
        wrong = attempt = 0
        while True:
            self._heartbeat.check()
            try:
                return self._send(job, directory, files)
            except UrlExpired:
                attempt = 0
            except IntegrityError:
                wrong += 1
                if wrong >= _WRONG_BYTES_TRIES:
                    raise
            except RETRYABLE as error:
                _log.info("the checkpoint of step %d waits: %s", job.step, error.message)
            except Cancelled:
                self._heartbeat.check()
                raise
            attempt += 1
            self._heartbeat.ended.wait(_BACKOFF.delay(min(attempt, 10), random.random()))

    def _send(self, job: _Job, directory: Path, files: list[FileSpec]) -> None:
        prepared = self._session.prepare_upload(self._held, job.step, files)
        point("worker.upload.after_prepare")
        for upload in prepared.uploads:
            self._transfer.upload(
                upload,
                directory / upload.file.path,
                on_bytes=self._heartbeat.moved,
                cancelled=self._heartbeat.ended,
            )
            point("worker.upload.after_file")
        point("worker.upload.before_commit")
        self._commit(prepared.checkpoint.id, job.metrics)
        point("worker.upload.after_commit")

    def _commit(self, checkpoint_id: str, metrics: dict[str, JsonValue]) -> None:
        request_id = new_request_id()
        while True:
            answer = self._session.commit(self._held, checkpoint_id, metrics, request_id)
            if answer.checkpoint.state in (pb.CHECKPOINT_STATE_COMMITTED, pb.CHECKPOINT_STATE_ACCEPTED):
                return
            # The coordinator reads the checkpoint back; that takes as long as it takes.
            if self._heartbeat.ended.wait(from_duration(answer.retry_after).total_seconds()):
                self._heartbeat.check()

    def _prune(self, newest: int) -> None:
        for checkpoint in local_checkpoints(self._folder):
            if checkpoint.step < newest:
                checkpoint.directory.with_name(checkpoint.directory.name + ".done").unlink(missing_ok=True)
                shutil.rmtree(checkpoint.directory)


def describe_error(error: BaseException) -> str:
    """One line about an error, for the coordinator and the volunteer."""
    return error.message if isinstance(error, CbtmError) else f"{type(error).__name__}: {error}"
