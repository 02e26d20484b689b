"""A coordinator's WorkerService in this process, scripted, behind a real gRPC server; and an object store behind it.

For edge cases of the protocol that a real coordinator cannot be brought to: an answer that is lost, an error at a
certain call, a store that breaks off. Everything else is tested against the real one.
"""

from __future__ import annotations

import hashlib
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc
import httpx
from grpc_status import rpc_status

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_api.v1.worker_service_pb2_grpc import WorkerServiceServicer, add_WorkerServiceServicer_to_server
from cbtm_common.errors import CbtmError
from cbtm_common.protos import duration
from cbtm_common.rpc import Connection, RetryPolicy
from cbtm_common.security import Security
from cbtm_common.transfer import Transfer
from cbtm_common.wire_errors import status_of

# In tests nobody waits: one attempt, and the caller's own retries.
ONE_ATTEMPT = RetryPolicy(attempts=1, initial=0.001, maximum=0.001)
POLICY = pb.LeasePolicy(
    lease_duration=duration(60.0), renew_interval=duration(20.0), checkpoint_interval=duration(600.0)
)
_METHODS = [method.name for method in ws.DESCRIPTOR.services_by_name["WorkerService"].methods]


class ScriptedCoordinator:
    """A context manager. `errors[method]` are raised first, one a call; then the method's answer is given.

    `calls` are all (method, request, bearer) in order. Objects are held by key; `store_fault(request)` may answer an
    HTTP request in the store's place.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, str]] = []
        self.errors: defaultdict[str, list[CbtmError]] = defaultdict(list)
        # What a method answers instead of its usual answer.
        self.answers: dict[str, Any] = {}
        self.objects: dict[str, bytes] = {}
        self.puts: list[str] = []
        self.store_fault: Callable[[httpx.Request], httpx.Response | None] = lambda request: None
        # How often a commit is answered with "still checking" first.
        self.commit_polls = 0
        self.directive: ws.Directive.ValueType = ws.DIRECTIVE_CONTINUE
        self.directive_reason = ""
        # What AcquireLease answers, in order; "idle" when they are used up.
        self.leases: list[ws.AcquireLeaseResponse] = []
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(4)
        self._server = grpc.server(self._pool)
        add_WorkerServiceServicer_to_server(_servicer(self), self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.stop(None).wait()
        self._pool.shutdown()

    def connect(self) -> Connection:
        return Connection(self.target, security=Security(insecure=1), timeout=5.0, policy=ONE_ATTEMPT)

    def transfer(self) -> Transfer:
        return Transfer(
            base_url="http://store", policy=ONE_ATTEMPT, transport=httpx.MockTransport(self._serve), timeout=5.0
        )

    def requests(self, method: str) -> list[Any]:
        with self._changed:
            return [request for name, request, _ in self.calls if name == method]

    def bearers(self, method: str) -> list[str]:
        """The credentials that `method` was called with."""
        return [bearer for name, _, bearer in self.calls if name == method]

    def wait_for(self, method: str, count: int = 1) -> list[Any]:
        """The requests of `method`, once there are `count`. Raises AssertionError after 5 seconds."""
        with self._changed:
            enough = self._changed.wait_for(lambda: [name for name, _, _ in self.calls].count(method) >= count, 5.0)
        assert enough, f"{count} calls of {method} did not come; there were {[name for name, _, _ in self.calls]}"
        return self.requests(method)

    def call(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        bearer = str(dict(context.invocation_metadata()).get("authorization", "")).removeprefix("Bearer ")
        with self._changed:
            self.calls.append((method, request, bearer))
            error = self.errors[method].pop(0) if self.errors[method] else None
            self._changed.notify_all()
        if error is not None:
            context.abort_with_status(rpc_status.to_status(status_of(error)))
        if method in self.answers:
            return self.answers[method]
        return getattr(self, f"_{method}")(request)

    def _Register(self, request: ws.RegisterRequest) -> ws.RegisterResponse:
        number = len(self.requests("Register"))
        worker = pb.Worker(id=f"worker_{number}", name=request.name)
        return ws.RegisterResponse(worker=worker)

    def _IssueCredential(self, request: ws.IssueCredentialRequest) -> ws.IssueCredentialResponse:
        number = len(self.requests("IssueCredential"))
        return ws.IssueCredentialResponse(credential=f"credential_{number}", life=duration(900))

    def _AcquireLease(self, request: ws.AcquireLeaseRequest) -> ws.AcquireLeaseResponse:
        if self.leases:
            return self.leases.pop(0)
        return ws.AcquireLeaseResponse(idle=True, reason="there is no work left", retry_after=duration(60))

    def _RenewLease(self, request: ws.RenewLeaseRequest) -> ws.RenewLeaseResponse:
        return ws.RenewLeaseResponse(directive=self.directive, reason=self.directive_reason)

    def _ListTaskShards(self, request: ws.ListTaskShardsRequest) -> ws.ListTaskShardsResponse:
        return ws.ListTaskShardsResponse()

    def _PrepareDownload(self, request: ws.PrepareDownloadRequest) -> ws.PrepareDownloadResponse:
        return ws.PrepareDownloadResponse(
            downloads=[
                pb.Download(file=file_of(key, self.objects[key]), request=pb.SignedRequest(method="GET", url=f"/{key}"))
                for key in request.keys
            ]
        )

    def _PrepareUpload(self, request: ws.PrepareUploadRequest) -> ws.PrepareUploadResponse:
        checkpoint = pb.Checkpoint(id=f"ckpt_{request.step}", step=request.step, state=pb.CHECKPOINT_STATE_UPLOADING)
        uploads = []
        for file in request.files:
            key = f"s{request.step}/{file.path}"
            stored = hashlib.sha256(self.objects.get(key, b"")).hexdigest() == file.sha256
            put = None if stored else pb.SignedRequest(method="PUT", url=f"/{key}")
            uploads.append(pb.Upload(file=file, stored=stored, request=put))
        return ws.PrepareUploadResponse(checkpoint=checkpoint, uploads=uploads)

    def _CommitCheckpoint(self, request: ws.CommitCheckpointRequest) -> ws.CommitCheckpointResponse:
        checkpoint = pb.Checkpoint(id=request.checkpoint_id, state=pb.CHECKPOINT_STATE_COMMITTED)
        if self.commit_polls:
            self.commit_polls -= 1
            checkpoint.state = pb.CHECKPOINT_STATE_UPLOADING
        return ws.CommitCheckpointResponse(checkpoint=checkpoint, retry_after=duration(0.01))

    def _ReleaseLease(self, request: ws.ReleaseLeaseRequest) -> ws.ReleaseLeaseResponse:
        return ws.ReleaseLeaseResponse()

    def _serve(self, request: httpx.Request) -> httpx.Response:
        """The object store."""
        answer = self.store_fault(request)
        if answer is not None:
            return answer
        key = request.url.path.lstrip("/")
        if request.method == "GET":
            return httpx.Response(200, stream=httpx.ByteStream(self.objects[key]))
        self.objects[key] = request.read()
        self.puts.append(key)
        return httpx.Response(200)


def file_of(key: str, data: bytes) -> pb.FileSpec:
    """`data` as the object of `key`, its path within its set being the key's last part."""
    return pb.FileSpec(path=key.rpartition("/")[2], key=key, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def lease_of(
    task_id: str = "task_1", *, committed_step: int = 0, total_steps: int = 10, recipe_json: str = "{}"
) -> ws.AcquireLeaseResponse:
    """An AcquireLease answer with work: cluster 3 of the run "web"."""
    return ws.AcquireLeaseResponse(
        lease=pb.Lease(id=f"lease_of_{task_id}", task_id=task_id, epoch=1),
        spec=ws.TaskSpec(
            task=pb.Task(
                id=task_id,
                kind=pb.TASK_KIND_EXPERT,
                cluster_id="run-c0003",
                cluster_index=3,
                committed_step=committed_step,
                total_steps=total_steps,
            ),
            run=pb.Run(id="run", name="web", recipe_json=recipe_json),
            policy=POLICY,
        ),
    )


def _servicer(scripted: ScriptedCoordinator) -> WorkerServiceServicer:
    def handler(method: str) -> Callable[[Any, Any, grpc.ServicerContext], Any]:
        return lambda self, request, context: scripted.call(method, request, context)

    made: WorkerServiceServicer = type(
        "Servicer", (WorkerServiceServicer,), {method: handler(method) for method in _METHODS}
    )()
    return made
