"""The worker's side of WorkerService: registers, and names lease, epoch and request_id in every call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import RETRYABLE, Unauthenticated, Unavailable
from cbtm_common.faults import point
from cbtm_common.files import FileSpec, check_name
from cbtm_common.ids import new_request_id
from cbtm_common.keys import new_key, public_key_of, registration_text, sign
from cbtm_common.protos import JsonValue, struct
from cbtm_common.rpc import Connection
from cbtm_common.security import split_token
from cbtm_worker.credential import WorkerCredential
from cbtm_worker.identity import Identity, Slot

# A check of a large checkpoint takes the coordinator seconds before it answers "ask again".
_COMMIT_TIMEOUT = 60.0
_CREDENTIAL_TIMEOUT = 10.0


@dataclass(frozen=True, kw_only=True)
class Held:
    """A lease that this worker holds."""

    lease_id: str
    epoch: int


class Session:
    """Calls as one registered worker."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        # (request_id, private key) of a registration whose answer may have been lost.
        self._joining = ("", b"")

    def sign_in(
        self, slot: Slot, *, token: str | None, name: str, hardware: pb.Hardware, request_id: str = ""
    ) -> Identity:
        """The identity in `slot`, or a new one for the join token.

        Who calls again with the same `request_id`, after an answer that was lost or could not be kept, is one worker.
        Raises Unauthenticated when there is neither or the token is not good, Unavailable when nobody answers,
        ResourceExhausted when the disk has no room for it.
        """
        identity = slot.load()
        if identity is None:
            if not token:
                raise Unauthenticated("token: pass --token (or CBTM_TOKEN) to join for the first time")
            self.connection.credential = split_token(token)[0]
            request_id = request_id or new_request_id()
            if self._joining[0] != request_id:
                self._joining = request_id, new_key()
            key = self._joining[1]
            public_key = public_key_of(key)
            request = ws.RegisterRequest(
                request_id=request_id,
                name=name,
                hardware=hardware,
                version=version("cbtm"),
                public_key=public_key,
                proof=sign(key, registration_text(request_id, public_key)),
            )
            point("worker.register.before")
            try:
                answer = self.connection.worker.Register(request)
            except RETRYABLE as error:
                check = f"`cbtm-worker check --coordinator {self.connection.target}` tells more"
                raise Unavailable(f"{error.message}; {check}") from error
            identity = Identity(
                worker_id=answer.worker.id, private_key=key.hex(), fingerprint=self.connection.fingerprint
            )
            slot.save(identity)
            point("worker.identity.after_write")
        self.use(identity)
        return identity

    def use(self, identity: Identity) -> None:
        """Calls as this worker from now on."""
        self.connection.credential = WorkerCredential(identity, self._issue)

    def _issue(self, authorization: str) -> ws.IssueCredentialResponse:
        return self.connection.worker.IssueCredential(
            ws.IssueCredentialRequest(), metadata=(("authorization", authorization),), timeout=_CREDENTIAL_TIMEOUT
        )

    def acquire(
        self, hardware: pb.Hardware, run: str, request_id: str = "", kinds: Sequence[pb.TaskKind.ValueType] = ()
    ) -> ws.AcquireLeaseResponse:
        """Who keeps `request_id` until an answer came leaves no lease behind whose answer was lost.

        Raises InvalidArgument for a task whose id may not name a folder.
        """
        answer = self.connection.worker.AcquireLease(
            ws.AcquireLeaseRequest(request_id=request_id or new_request_id(), hardware=hardware, run=run, kinds=kinds)
        )
        if answer.HasField("lease"):
            check_name(answer.spec.task.id, field="task.id")
        return answer

    def renew(self, held: Held, progress: pb.Progress, *, timeout: float | None = None) -> ws.RenewLeaseResponse:
        """`timeout` in seconds, for each attempt."""
        return self.connection.worker.RenewLease(
            ws.RenewLeaseRequest(
                request_id=new_request_id(), lease_id=held.lease_id, epoch=held.epoch, progress=progress
            ),
            timeout=timeout,
        )

    def shards(self, held: Held) -> list[FileSpec]:
        """All training shards of the task, in training order."""
        found: list[FileSpec] = []
        page = ""
        while True:
            answer = self.connection.worker.ListTaskShards(
                ws.ListTaskShardsRequest(lease_id=held.lease_id, epoch=held.epoch, page_size=500, page_token=page)
            )
            found += [FileSpec.from_proto(shard.file) for shard in answer.shards]
            page = answer.next_page_token
            if not page:
                return found

    def downloads(self, held: Held, keys: list[str]) -> Sequence[pb.Download]:
        return self.connection.worker.PrepareDownload(
            ws.PrepareDownloadRequest(lease_id=held.lease_id, epoch=held.epoch, keys=keys)
        ).downloads

    def prepare_upload(self, held: Held, step: int, files: Sequence[FileSpec]) -> ws.PrepareUploadResponse:
        return self.connection.worker.PrepareUpload(
            ws.PrepareUploadRequest(
                request_id=new_request_id(),
                lease_id=held.lease_id,
                epoch=held.epoch,
                step=step,
                files=[f.to_proto() for f in files],
            )
        )

    def commit(
        self, held: Held, checkpoint_id: str, metrics: dict[str, JsonValue], request_id: str
    ) -> ws.CommitCheckpointResponse:
        return self.connection.worker.CommitCheckpoint(
            ws.CommitCheckpointRequest(
                request_id=request_id,
                lease_id=held.lease_id,
                epoch=held.epoch,
                checkpoint_id=checkpoint_id,
                metrics=struct(metrics),
            ),
            timeout=_COMMIT_TIMEOUT,
        )

    def report_check(
        self, held: Held, *, evaluation: ws.EvaluationReport | None = None, audit: ws.AuditReport | None = None
    ) -> ws.ReportCheckResponse:
        return self.connection.worker.ReportCheck(
            ws.ReportCheckRequest(
                request_id=new_request_id(),
                lease_id=held.lease_id,
                epoch=held.epoch,
                evaluation=evaluation,
                audit=audit,
            ),
            timeout=_COMMIT_TIMEOUT,
        )

    def release(self, held: Held, reason: ws.ReleaseReason.ValueType, detail: str) -> ws.ReleaseLeaseResponse:
        return self.connection.worker.ReleaseLease(
            ws.ReleaseLeaseRequest(
                request_id=new_request_id(),
                lease_id=held.lease_id,
                epoch=held.epoch,
                release_reason=reason,
                detail=detail[:2000],
            )
        )
