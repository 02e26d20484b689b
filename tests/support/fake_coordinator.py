"""Stands in for the coordinator and its store where a test wants to say what they answer, and when.

`FakeSession` has the methods of `cbtm_worker.session.Session`, `FakeTransfer` that of `cbtm_common.transfer.Transfer`
which the worker's parts call, and `FakeConnection` those of `cbtm_common.rpc.Connection` on which a Session rests.
What a test queues in `answers` comes back, an exception by being raised; with nothing queued, all goes well.
Thread-safe as far as the worker needs it.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.files import FileSpec
from cbtm_common.protos import JsonValue
from cbtm_worker.session import Held

HELD = Held(lease_id="lease_1", epoch=3)


class FakeSession:
    """A coordinator that grants everything, unless `answers[method]` says otherwise."""

    def __init__(self) -> None:
        self.answers: dict[str, deque[Any]] = defaultdict(deque)
        self.calls: list[tuple[str, Any]] = []
        # Steps whose checkpoints are committed, in the order of their commits.
        self.committed: list[int] = []
        self._changed = threading.Condition()

    def _answer(self, method: str, argument: Any, default: Callable[[], Any]) -> Any:
        with self._changed:
            self.calls.append((method, argument))
            queued = self.answers[method].popleft() if self.answers[method] else None
            self._changed.notify_all()
        if isinstance(queued, BaseException):
            raise queued
        if callable(queued):
            queued()
        elif queued is not None:
            return queued
        return default()

    def wait_for_calls(self, method: str, count: int) -> list[Any]:
        """The arguments of the first `count` calls, waiting until there are so many."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.arguments(method)) >= count, 10), self.calls
            return self.arguments(method)[:count]

    def arguments(self, method: str) -> list[Any]:
        return [argument for name, argument in self.calls if name == method]

    # The methods of Session

    def renew(self, held: Held, progress: pb.Progress, *, timeout: float | None = None) -> ws.RenewLeaseResponse:
        answer: ws.RenewLeaseResponse = self._answer(
            "renew", progress, lambda: ws.RenewLeaseResponse(directive=ws.DIRECTIVE_CONTINUE)
        )
        return answer

    def prepare_upload(self, held: Held, step: int, files: Sequence[FileSpec]) -> ws.PrepareUploadResponse:
        answer: ws.PrepareUploadResponse = self._answer(
            "prepare_upload",
            step,
            lambda: ws.PrepareUploadResponse(
                checkpoint=pb.Checkpoint(id=f"ckpt_{step}", step=step),
                uploads=[pb.Upload(file=file.to_proto()) for file in files],
            ),
        )
        return answer

    def commit(
        self, held: Held, checkpoint_id: str, metrics: dict[str, JsonValue], request_id: str
    ) -> ws.CommitCheckpointResponse:
        def committed() -> ws.CommitCheckpointResponse:
            self.committed.append(int(checkpoint_id.removeprefix("ckpt_")))
            return ws.CommitCheckpointResponse(checkpoint=pb.Checkpoint(state=pb.CHECKPOINT_STATE_COMMITTED))

        answer: ws.CommitCheckpointResponse = self._answer("commit", (checkpoint_id, request_id), committed)
        return answer


class FakeTransfer:
    """A store that takes everything; `answers` as in FakeSession, one for each file."""

    def __init__(self) -> None:
        self.answers: deque[Any] = deque()
        self.sent: list[str] = []

    def upload(
        self,
        upload: pb.Upload,
        source: Path,
        *,
        on_bytes: Callable[[int], None] | None = None,
        cancelled: threading.Event | None = None,
    ) -> None:
        queued = self.answers.popleft() if self.answers else None
        if isinstance(queued, BaseException):
            raise queued
        if callable(queued):
            queued(cancelled)
        if on_bytes is not None:
            on_bytes(source.stat().st_size)
        self.sent.append(upload.file.path)


class FakeConnection:
    """A coordinator that lets everybody join and has no work; its calls by name, requests as they came."""

    target = "fake:1"
    http_base = "http://fake:2"

    def __init__(self) -> None:
        self.credential: Any = None
        self.fingerprint = ""
        self.answers: dict[str, deque[Any]] = defaultdict(deque)
        self.calls: list[tuple[str, Any]] = []
        self.worker = self

    def requests(self, method: str) -> list[Any]:
        return [request for name, request in self.calls if name == method]

    def _answer(self, method: str, request: Any, default: Any) -> Any:
        self.calls.append((method, request))
        queued = self.answers[method].popleft() if self.answers[method] else default
        if isinstance(queued, BaseException):
            raise queued
        return queued

    def Register(self, request: ws.RegisterRequest) -> Any:
        number = len(self.requests("Register")) + 1
        made = ws.RegisterResponse(worker=pb.Worker(id=f"worker_{number}"))
        return self._answer("Register", request, made)

    def AcquireLease(self, request: ws.AcquireLeaseRequest) -> Any:
        return self._answer("AcquireLease", request, ws.AcquireLeaseResponse(idle=True, reason="there is no work left"))

    def RenewLease(self, request: ws.RenewLeaseRequest, timeout: float | None = None) -> Any:
        return self._answer("RenewLease", request, ws.RenewLeaseResponse(directive=ws.DIRECTIVE_CONTINUE))

    def ReleaseLease(self, request: ws.ReleaseLeaseRequest) -> Any:
        return self._answer("ReleaseLease", request, ws.ReleaseLeaseResponse())
