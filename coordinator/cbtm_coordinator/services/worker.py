"""WorkerService: thin over the store. Every write under a lease names its epoch; every mutation its request_id."""

from __future__ import annotations

import math
from typing import Any

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_api.v1.worker_service_pb2_grpc import WorkerServiceServicer
from cbtm_common.errors import InvalidArgument, InvalidState
from cbtm_common.faults import point
from cbtm_common.protos import duration, timestamp
from cbtm_common.recipe import Recipe
from cbtm_coordinator.lifecycle import CHECKING, RunState
from cbtm_coordinator.scheduler import Measured, Pace
from cbtm_coordinator.services import assignment, convert, credit, enrolment
from cbtm_coordinator.services import checks as check_service
from cbtm_coordinator.services.auth import caller
from cbtm_coordinator.services.checkpoint_uploads import CheckpointUploads
from cbtm_coordinator.services.commit import Verifier
from cbtm_coordinator.services.context import ServiceContext, checked_files
from cbtm_coordinator.services.structure import Structures
from cbtm_coordinator.services.task_inputs import TaskInputs
from cbtm_coordinator.store import Connection, Renewal, identities, leases, runs, tasks
from cbtm_coordinator.store.records import Progress

_MAX_PROBE_BYTES = 16 * 1024 * 1024
_MAX_DETAIL = 2000


class WorkerServicer(WorkerServiceServicer):
    """See `protos/cbtm_api/v1/worker_service.proto` for what each call promises."""

    def __init__(self, context: ServiceContext, verifier: Verifier, structures: Structures) -> None:
        self._context = context
        self._store = context.store
        self._inputs = TaskInputs(context)
        self._uploads = CheckpointUploads(context, verifier, structures)

    def Register(self, request: ws.RegisterRequest, context: Any) -> ws.RegisterResponse:
        return enrolment.register(self._context, request)

    def IssueCredential(self, request: ws.IssueCredentialRequest, context: Any) -> ws.IssueCredentialResponse:
        return enrolment.issue_credential(self._context, request)

    def AcquireLease(self, request: ws.AcquireLeaseRequest, context: Any) -> ws.AcquireLeaseResponse:
        return assignment.acquire(self._context, self._inputs, request)

    def RenewLease(self, request: ws.RenewLeaseRequest, context: Any) -> ws.RenewLeaseResponse:
        # Not recorded by request_id: a renewal repeated is a renewal, and there are ten thousand a minute.
        given = request.progress
        speed = given.tokens_per_second
        progress = Progress(
            step=given.step,
            loss=given.loss,
            # Sums and estimates are made of it. A loss that is no number says something; this does not.
            tokens_per_second=speed if 0 <= speed < math.inf else 0.0,
            phase=convert.printable(given.phase, 32),
            transferred_bytes=given.transferred_bytes,
            measured=Measured(
                step_seconds=given.step_seconds,
                upload_bytes_per_second=given.upload_bytes_per_second,
                checkpoint_bytes=given.checkpoint_bytes,
                renew_seconds=given.renew_seconds,
            ),
        )
        renewed = self._store.renew(
            Renewal(lease_id=request.lease_id, epoch=request.epoch, worker_id=caller.get().id, progress=progress)
        )
        point("coordinator.renew.after_commit")
        told = renewed.told
        return ws.RenewLeaseResponse(
            lease=convert.lease(renewed.lease),
            directive=ws.Directive.Value(f"DIRECTIVE_{told.directive}"),
            reason=told.reason,
            # Most leases go as they began.
            policy=_sized(told.pace) if told.pace.reason else None,
        )

    def ListTaskShards(self, request: ws.ListTaskShardsRequest, context: Any) -> ws.ListTaskShardsResponse:
        return self._inputs.list_shards(request)

    def PrepareDownload(self, request: ws.PrepareDownloadRequest, context: Any) -> ws.PrepareDownloadResponse:
        return self._inputs.prepare_download(request)

    def PrepareUpload(self, request: ws.PrepareUploadRequest, context: Any) -> ws.PrepareUploadResponse:
        return self._uploads.prepare(request)

    def CommitCheckpoint(self, request: ws.CommitCheckpointRequest, context: Any) -> ws.CommitCheckpointResponse:
        return self._uploads.commit(request)

    def ReportCheck(self, request: ws.ReportCheckRequest, context: Any) -> ws.ReportCheckResponse:
        def answer(tx: Connection) -> ws.ReportCheckResponse:
            lease, task = leases.require(tx, request.lease_id, request.epoch, caller.get().id)
            if task.kind not in CHECKING:
                raise InvalidState(f"task {task.id} is {task.kind}: it is trained, there is nothing to report")
            worker = identities.get_worker(tx, caller.get().id)
            compare_with = check_service.report(tx, self._store.now(), request, lease, task, worker)
            return ws.ReportCheckResponse(
                task_state=convert.task_state(tasks.get_task(tx, task.id)),
                compare_with=None if compare_with is None else convert.checkpoint(compare_with),
            )

        return self._context.once(request, ws.ReportCheckResponse, answer)

    def ReleaseLease(self, request: ws.ReleaseLeaseRequest, context: Any) -> ws.ReleaseLeaseResponse:
        reason = request.release_reason
        if reason == ws.RELEASE_REASON_UNSPECIFIED:
            raise InvalidArgument("release_reason: is not set", field="release_reason")

        def answer(tx: Connection) -> ws.ReleaseLeaseResponse:
            lease, task = leases.release(
                tx,
                self._store.now(),
                lease_id=request.lease_id,
                epoch=request.epoch,
                worker_id=caller.get().id,
                failed=reason == ws.RELEASE_REASON_FAILED,
                is_unfit=reason == ws.RELEASE_REASON_UNFIT,
                detail=convert.printable(request.detail, _MAX_DETAIL),
            )
            point("coordinator.release.before_commit")
            return ws.ReleaseLeaseResponse(lease=convert.lease(lease), task_state=convert.task_state(task))

        response = self._context.once(request, ws.ReleaseLeaseResponse, answer)
        point("coordinator.release.after_commit")
        return response

    def GetReceipt(self, request: ws.GetReceiptRequest, context: Any) -> ws.GetReceiptResponse:
        with self._store.reading() as tx:
            worker = identities.get_worker(tx, caller.get().id)
        return ws.GetReceiptResponse(receipt=credit.receipt(self._context, worker.account_id))

    def Probe(self, request: ws.ProbeRequest, context: Any) -> ws.ProbeResponse:
        if not 0 <= request.transfer_bytes <= _MAX_PROBE_BYTES:
            raise InvalidArgument(f"transfer_bytes: at most {_MAX_PROBE_BYTES}", field="transfer_bytes")
        response = ws.ProbeResponse(
            server_time=timestamp(self._store.now()),
            server_version=self._context.version,
            min_worker_version=self._context.min_worker_version,
        )
        with self._store.reading() as tx:
            active = [
                run for run in runs.list_runs(tx, limit=1000) if run.state in (RunState.SEEDING, RunState.TRAINING)
            ]
        if active:
            largest = max(active, key=lambda run: run.model_parameters)
            response.model_parameters = largest.model_parameters
            response.sequence_length = Recipe.from_json(largest.recipe_json).sequence_length
            response.run_name = largest.name
        if request.transfer_bytes:
            key = f"scratch/{caller.get().id}/{request.sha256[:64]}"
            (file,) = checked_files(
                [pb.FileSpec(path="probe", size=request.transfer_bytes, sha256=request.sha256)],
                maximum=1,
                prefix=key,
            )
            response.upload.CopyFrom(self._context.upload(file))
            response.download.CopyFrom(self._context.download([file], [file.key])[0])
        return response


def _sized(pace: Pace) -> pb.LeasePolicy:
    """How often to renew stays what came with the task."""
    return pb.LeasePolicy(
        lease_duration=duration(pace.lease), checkpoint_interval=duration(pace.checkpoint), reason=pace.reason
    )
