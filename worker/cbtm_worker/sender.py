"""Sends one checkpoint of this disk until the coordinator has committed it.

What may pass is waited out; an upload goes on by part after a broken link, an expired URL or a restart, for the
coordinator signs only what is missing. Not here: which checkpoint to send, and when (`cbtm_worker.uploader`).
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.errors import (
    RETRYABLE,
    AlreadyExists,
    Cancelled,
    CbtmError,
    IntegrityError,
    InternalError,
    PermissionDenied,
    ResourceExhausted,
)
from cbtm_common.faults import point
from cbtm_common.files import FileSpec, describe
from cbtm_common.ids import new_request_id
from cbtm_common.protos import JsonValue, from_duration
from cbtm_common.rpc import RetryPolicy
from cbtm_common.transfer import Transfer
from cbtm_worker.heartbeat import Heartbeat
from cbtm_worker.session import Held, Session

_log = logging.getLogger(__name__)
# Tries in all when the coordinator found other bytes than were declared, or failed by itself.
_TRIES = 3
# A URL that expired, a store or coordinator that is away, a store that is full; or we gave up.
_PASSING: tuple[type[CbtmError], ...] = (*RETRYABLE, Cancelled, ResourceExhausted)
# The link's speed is taken over so long at least; a checkpoint that is sent sooner needs no other pace.
_RATE_SECONDS = 2.0
_BACKOFF = RetryPolicy(attempts=1, initial=1.0, maximum=30.0)


@dataclass(frozen=True, kw_only=True)
class Sending:
    """What is on its way. Bytes that were sent again after a failure count again."""

    step: int
    sent_bytes: int = 0
    total_bytes: int = 0


class Sender:
    """Sends checkpoints under one lease, one at a time. `sending` may be read from any thread; `clock` is monotonic."""

    def __init__(
        self,
        session: Session,
        held: Held,
        heartbeat: Heartbeat,
        transfer: Transfer,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = session
        self._held = held
        self._heartbeat = heartbeat
        self._transfer = transfer
        self._clock = clock
        self._rate = _Rate(clock)
        self.sending: Sending | None = None
        # When the checkpoint in hand last came nearer to being committed, by `clock`.
        self.advanced = clock()
        self._least_left: int | None = None

    def send(
        self,
        directory: Path,
        *,
        step: int,
        metrics: dict[str, JsonValue],
        cancelled: threading.Event,
        is_needless: Callable[[], bool],
    ) -> bool:
        """Whether it is committed; not when `cancelled` broke it off, or nothing was sent yet and it `is_needless`.

        Raises what ended the lease, and what will not pass.
        """
        self.sending = Sending(step=step)
        self.advanced, self._least_left = self._clock(), None
        try:
            return self._send_until_committed(directory, step, metrics, cancelled, is_needless)
        finally:
            self.sending = None

    def _send_until_committed(
        self,
        directory: Path,
        step: int,
        metrics: dict[str, JsonValue],
        cancelled: threading.Event,
        is_needless: Callable[[], bool],
    ) -> bool:
        files = describe(directory)
        self._heartbeat.uploads(checkpoint_bytes=sum(file.size for file in files), bytes_per_second=0.0)
        wrong = attempt = 0
        left: int | None = None
        while True:
            self._heartbeat.check()
            try:
                point("worker.upload.before_prepare")
                prepared = self._session.prepare_upload(self._held, step, files)
                before, left = left, sum(_bytes_left(upload) for upload in prepared.uploads)
                if before is not None and left < before:
                    attempt = 0
                self.sending = Sending(step=step, total_bytes=left)
                self._note_left(left)
                self._upload(prepared.uploads, directory, files, cancelled)
                self._commit(prepared.checkpoint.id, metrics, cancelled)
                return True
            except (IntegrityError, AlreadyExists, InternalError) as error:
                wrong += 1
                if wrong >= _TRIES:
                    raise
                _log.warning("the checkpoint of step %d is sent again: %s", step, error.message)
            except _PASSING as error:
                _log.info("the checkpoint of step %d waits: %s", step, error.message)
            attempt += 1
            if cancelled.wait(_BACKOFF.delay(min(attempt, 10) - 1, random.random())):
                self._heartbeat.check()
                return False
            if self.sending is not None and self.sending.sent_bytes == 0 and is_needless():
                return False

    def _upload(
        self, uploads: Sequence[pb.Upload], directory: Path, files: Sequence[FileSpec], cancelled: threading.Event
    ) -> None:
        point("worker.upload.after_prepare")
        self._rate = _Rate(self._clock)
        mine = {(file.path, file.size, file.sha256) for file in files}
        for upload in uploads:
            if (upload.file.path, upload.file.size, upload.file.sha256) not in mine:
                # Nothing else of this machine is anybody's.
                raise PermissionDenied(
                    f"the coordinator asks for {upload.file.path[:200]!r}, which is no file of this checkpoint"
                )
            self._transfer.upload(upload, directory / upload.file.path, on_bytes=self._moved, cancelled=cancelled)
            point("worker.upload.after_file")
        point("worker.upload.before_commit")

    def _moved(self, count: int) -> None:
        """Called by one thread at a time."""
        self._heartbeat.moved(count)
        speed = self._rate.add(count)
        if speed is not None:
            self._heartbeat.uploads(checkpoint_bytes=0, bytes_per_second=speed)
        if self.sending is not None:
            self.sending = replace(self.sending, sent_bytes=self.sending.sent_bytes + count)
            self._note_left(self.sending.total_bytes - self.sending.sent_bytes)

    def _note_left(self, count: int) -> None:
        """Bytes that are sent again after a failure bring the checkpoint no nearer."""
        if self._least_left is None or count < self._least_left:
            self._least_left, self.advanced = max(0, count), self._clock()

    def _commit(self, checkpoint_id: str, metrics: dict[str, JsonValue], cancelled: threading.Event) -> None:
        request_id = new_request_id()
        while True:
            answer = self._session.commit(self._held, checkpoint_id, metrics, request_id)
            if answer.checkpoint.state in (pb.CHECKPOINT_STATE_COMMITTED, pb.CHECKPOINT_STATE_ACCEPTED):
                break
            self.advanced = self._clock()
            # The coordinator reads the checkpoint back; that takes as long as it takes.
            if cancelled.wait(from_duration(answer.retry_after).total_seconds()):
                raise Cancelled("the commit was broken off")
        point("worker.upload.after_commit")


class _Rate:
    """Bytes a second since it was made, waits between tries included; told now and then, not before a first moment."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._start = clock()
        self._bytes = 0
        self._next = self._start + _RATE_SECONDS

    def add(self, count: int) -> float | None:
        self._bytes += count
        now = self._clock()
        if now < self._next:
            return None
        self._next = now + _RATE_SECONDS
        return self._bytes / (now - self._start)


def _bytes_left(upload: pb.Upload) -> int:
    if upload.stored:
        return 0
    if upload.HasField("multipart"):
        return sum(part.size for part in upload.multipart.parts)
    return upload.file.size
