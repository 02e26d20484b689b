"""WorkerService: thin over the store. Every write under a lease names its epoch; every mutation its request_id."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from google.protobuf.json_format import MessageToDict

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_api.v1.worker_service_pb2_grpc import WorkerServiceServicer
from cbtm_common.errors import (
    CheckpointRejected,
    IntegrityError,
    InvalidArgument,
    InvalidState,
    LeaseLost,
    ResourceExhausted,
)
from cbtm_common.faults import point
from cbtm_common.files import FileSpec
from cbtm_common.ids import new_id
from cbtm_common.keys import is_signed, registration_text
from cbtm_common.protos import duration, from_struct, timestamp
from cbtm_common.recipe import Recipe
from cbtm_coordinator.lifecycle import CHECKING, TRAINING, CheckpointState, RunState, TaskKind
from cbtm_coordinator.scheduler import Measured, Pace, poll_after
from cbtm_coordinator.services import checks as check_service
from cbtm_coordinator.services import convert, credit, paging
from cbtm_coordinator.services.auth import caller, check_current
from cbtm_coordinator.services.commit import Verifier
from cbtm_coordinator.services.context import ServiceContext, checked_files
from cbtm_coordinator.services.structure import Structures, add_sizes
from cbtm_coordinator.store import (
    Connection,
    Renewal,
    acceptance,
    checkpoints,
    checks,
    commits,
    events,
    experts,
    identities,
    leases,
    rejections,
    runs,
    tasks,
)
from cbtm_coordinator.store.records import LeaseRecord, Progress, RunRecord, TaskRecord, TokenRecord, WorkerRecord
from cbtm_coordinator.store.runs import TRAIN
from cbtm_coordinator.structure.manifest import check_paths

_MAX_FILES = 4096
_MAX_PROBE_BYTES = 16 * 1024 * 1024
_MAX_DETAIL = 2000
_MAX_TOKENIZERS = 256
# A call waits this long for the check of a checkpoint; the worker then asks again after the other.
_COMMIT_WAIT = 8.0
_COMMIT_RETRY = timedelta(seconds=2)
_QUOTA_RETRY = timedelta(seconds=30)


class WorkerServicer(WorkerServiceServicer):
    """See `protos/cbtm_api/v1/worker_service.proto` for what each call promises."""

    def __init__(self, context: ServiceContext, verifier: Verifier, structures: Structures) -> None:
        self._context = context
        self._store = context.store
        self._verifier = verifier
        self._structures = structures
        # Nobody can foresee which segments are audited.
        self._draw = random.SystemRandom().random
        # By the run whose they are.
        self._tokenizers: dict[str, list[FileSpec]] = {}

    def Register(self, request: ws.RegisterRequest, context: Any) -> ws.RegisterResponse:
        name = request.name.strip()
        if not 1 <= len(name) <= 200 or not name.isprintable():
            raise InvalidArgument("name: 1 to 200 printable characters are needed", field="name")
        if not is_signed(request.public_key, registration_text(request.request_id, request.public_key), request.proof):
            raise InvalidArgument("proof: is not a signature of this request by public_key", field="proof")
        public_key = request.public_key.hex()

        def answer(tx: Connection) -> ws.RegisterResponse:
            now = self._store.now()
            token = identities.use_token(tx, now, caller.get().id)
            if token.recovers_worker_id:
                return ws.RegisterResponse(worker=convert.worker(self._recover(tx, token, public_key)))
            worker = identities.create_worker(
                tx,
                now,
                worker_id=new_id("worker"),
                account_id=token.account_id,
                name=name,
                public_key=public_key,
                token_id=caller.get().id,
                hardware_json=_hardware_json(request.hardware),
                version=_printable(request.version, 64),
            )
            return ws.RegisterResponse(worker=convert.worker(worker))

        response = self._context.once(request, ws.RegisterResponse, answer)
        point("coordinator.register.after_commit")
        return response

    def _recover(self, tx: Connection, token: TokenRecord, public_key: str) -> WorkerRecord:
        now = self._store.now()
        worker = identities.replace_key(tx, now, token.recovers_worker_id, public_key)
        # Whoever has the former key holds nothing with it any more.
        leases.revoke_leases(tx, now, reason="this worker registered a new key", worker_id=worker.id)
        return worker

    def IssueCredential(self, request: ws.IssueCredentialRequest, context: Any) -> ws.IssueCredentialResponse:
        signer, credentials = caller.get(), self._context.credentials
        return ws.IssueCredentialResponse(
            credential=credentials.issue(signer.id, signer.key_id), life=duration(credentials.life)
        )

    def AcquireLease(self, request: ws.AcquireLeaseRequest, context: Any) -> ws.AcquireLeaseResponse:
        worker_id = caller.get().id
        hardware = _hardware_json(request.hardware) if request.HasField("hardware") else ""
        # A worker that names none is older than the others.
        kinds = {TaskKind(pb.TaskKind.Name(k).removeprefix("TASK_KIND_")) for k in request.kinds if k} or TRAINING

        def answer(tx: Connection) -> ws.AcquireLeaseResponse:
            now = self._store.now()
            run_id = runs.get(tx, request.run).id if request.run else None
            worker = identities.seen(tx, now, worker_id, hardware_json=hardware)
            check_current(worker, caller.get())
            if worker.not_before_time is not None and worker.not_before_time > now:
                return ws.AcquireLeaseResponse(retry_after=duration(worker.not_before_time - now), reason=worker.reason)
            quota = self._context.quotas.leases
            if quota and leases.count_live(tx, worker_id) >= quota:
                reason = f"this worker holds {quota} leases, the most it may; they end unless they are renewed"
                return ws.AcquireLeaseResponse(retry_after=duration(_QUOTA_RETRY), reason=reason)
            claimed = leases.acquire(
                tx,
                now,
                worker_id,
                run_id=run_id,
                account_id=worker.account_id,
                trusted=worker.trusted,
                kinds=kinds,
            )
            if claimed is None:
                return self._nothing(tx, run_id)
            point("coordinator.acquire.before_commit")
            return ws.AcquireLeaseResponse(lease=convert.lease(claimed.lease), spec=self._spec(tx, claimed))

        response = self._context.once(request, ws.AcquireLeaseResponse, answer, keep=lambda r: r.HasField("lease"))
        point("coordinator.acquire.after_commit")
        return response

    def _nothing(self, tx: Connection, run_id: str | None) -> ws.AcquireLeaseResponse:
        open_tasks = tasks.count_open(tx, run_id=run_id, worker_id=caller.get().id)
        reason = f"{open_tasks} task(s) are taken or not open yet" if open_tasks else "there is no work left"
        return ws.AcquireLeaseResponse(
            retry_after=duration(poll_after(open_tasks=open_tasks)), reason=reason, idle=not open_tasks
        )

    def _spec(self, tx: Connection, claim: leases.Claim) -> ws.TaskSpec:
        run, task = claim.run, claim.task
        check = checks.get(tx, task.id) if task.kind in CHECKING else None
        subject = task if check is None else tasks.get_task(tx, check.subject_id)
        policy = leases.lease_policy(run.recipe_json)
        resume = checkpoints.latest_good(tx, task) if check is None else check_service.begins_at(tx, check)
        return ws.TaskSpec(
            task=convert.task(task),
            run=convert.run(run),
            policy=pb.LeasePolicy(
                lease_duration=duration(policy.lease_seconds),
                renew_interval=duration(policy.renew_seconds),
                checkpoint_interval=duration(policy.checkpoint_seconds),
            ),
            base_model_files=[f.to_proto() for f in self._base_model(tx, run, subject)],
            tokenizer_files=[f.to_proto() for f in self._tokenizer(tx, run)],
            resume_from=convert.checkpoint(resume) if resume else None,
            check=None if check is None else check_service.describe(tx, run, check),
        )

    def _base_model(self, tx: Connection, run: RunRecord, task: TaskRecord) -> list[FileSpec]:
        """What the task branches from: the run's seed for an expert, its base model for the seed itself."""
        seed = experts.seed(tx, run.id) if task.kind is TaskKind.EXPERT else None
        return seed.files if seed else [f.file for f in runs.files(tx, run, "BASE_MODEL")]

    def _tokenizer(self, tx: Connection, run: RunRecord) -> list[FileSpec]:
        """Of a run that has tasks, so that its files are what they stay."""
        found = self._tokenizers.get(run.data_run_id)
        if found is None:
            found = [f.file for f in runs.files(tx, run, "TOKENIZER")]
            if len(self._tokenizers) >= _MAX_TOKENIZERS:
                self._tokenizers.clear()
            self._tokenizers[run.data_run_id] = found
        return found

    def RenewLease(self, request: ws.RenewLeaseRequest, context: Any) -> ws.RenewLeaseResponse:
        # Not recorded by request_id: a renewal repeated is a renewal, and there are ten thousand a minute.
        given = request.progress
        speed = given.tokens_per_second
        progress = Progress(
            step=given.step,
            loss=given.loss,
            # Sums and estimates are made of it. A loss that is no number says something; this does not.
            tokens_per_second=speed if 0 <= speed < math.inf else 0.0,
            phase=_printable(given.phase, 32),
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
        size = paging.page_size(request.page_size)
        after = paging.decode(request.page_token, [])
        with self._store.reading() as tx:
            _, task = self._held(tx, request.lease_id, request.epoch)
            if task.kind is TaskKind.EVALUATE:
                return ws.ListTaskShardsResponse()
            if task.kind is TaskKind.AUDIT:
                task = tasks.get_task(tx, checks.get(tx, task.id).subject_id)
            run = runs.get(tx, task.run_id)
            rows = runs.list_shards(
                tx,
                run.data_run_id,
                split=TRAIN,
                # The seed, and a baseline's only expert, train on every cluster.
                cluster_id=None if task.kind is TaskKind.SEED or run.baseline_of else task.cluster_id,
                after=tuple(after) if after else None,
                limit=size,
            )
        more = len(rows) == size
        last = rows[-1] if rows else None
        return ws.ListTaskShardsResponse(
            shards=[convert.shard(shard) for _, shard in rows],
            next_page_token=paging.encode([last[0], last[1].split, last[1].ordinal]) if more and last else "",
        )

    def PrepareDownload(self, request: ws.PrepareDownloadRequest, context: Any) -> ws.PrepareDownloadResponse:
        with self._store.reading() as tx:
            _, task = self._held(tx, request.lease_id, request.epoch)
            files = self._readable(tx, task, list(request.keys))
        return ws.PrepareDownloadResponse(downloads=self._context.download(files, request.keys))

    def _readable(self, tx: Connection, task: TaskRecord, keys: list[str]) -> list[FileSpec]:
        """What the holder of a task may read, shards only among `keys`: none held out, none of another cluster.

        Of an EVALUATE: what it scores, and on what.
        """
        run = runs.get(tx, task.run_id)
        if task.kind in CHECKING:
            check = checks.get(tx, task.id)
            subject = tasks.get_task(tx, check.subject_id)
            account_id = identities.get_worker(tx, caller.get().id).account_id
            files = [*check_service.readable(tx, run, check, account_id), *self._base_model(tx, run, subject)]
            if check.kind is TaskKind.AUDIT:
                files += self._train_shards(tx, run, subject, keys)
            return files
        resume = checkpoints.latest_good(tx, task)
        return [
            *self._train_shards(tx, run, task, keys),
            *self._base_model(tx, run, task),
            *self._tokenizer(tx, run),
            *(resume.files if resume else []),
        ]

    def _train_shards(self, tx: Connection, run: RunRecord, task: TaskRecord, keys: list[str]) -> list[FileSpec]:
        cluster_id = None if task.kind is TaskKind.SEED or run.baseline_of else task.cluster_id
        found = runs.list_shards(tx, run.data_run_id, split=TRAIN, cluster_id=cluster_id, keys=keys)
        return [convert.shard_file(shard) for _, shard in found]

    def _held(self, tx: Connection, lease_id: str, epoch: int) -> tuple[LeaseRecord, TaskRecord]:
        return leases.require(tx, lease_id, epoch, caller.get().id)

    def PrepareUpload(self, request: ws.PrepareUploadRequest, context: Any) -> ws.PrepareUploadResponse:
        with self._store.writing(by_statement=True) as tx:
            lease, task = self._held(tx, request.lease_id, request.epoch)
            if task.kind in CHECKING:
                raise InvalidState(f"task {task.id} is {task.kind}: it has no checkpoints")
            prefix = f"runs/{task.run_id}/tasks/{task.id}/e{lease.epoch:08d}/s{request.step:010d}"
            files = checked_files(request.files, maximum=_MAX_FILES, prefix=prefix)
            check_paths(files)
            self._structures.check_manifest(tx, task, request.step, files)
            self._check_quota(tx, lease, task, request.step, files)
            checkpoint = checkpoints.begin(
                tx, self._store.now(), lease=lease, task=task, step=request.step, files=files
            )
        point("coordinator.prepare.after_begin")
        visible = checkpoint.state is not CheckpointState.UPLOADING
        response = ws.PrepareUploadResponse(
            checkpoint=convert.checkpoint(checkpoint),
            uploads=[] if visible else [self._context.upload(f) for f in checkpoint.files],
        )
        point("coordinator.prepare.after_sign")
        return response

    def _check_quota(
        self, tx: Connection, lease: LeaseRecord, task: TaskRecord, step: int, files: Sequence[FileSpec]
    ) -> None:
        """What is not committed fills the store all the same."""
        if not self._context.quotas.uploads:
            return
        most = self._context.quotas.upload_bytes(runs.get_by_id(tx, task.run_id).model_parameters)
        sent = checkpoints.bytes_on_the_way(
            tx, worker_id=lease.worker_id, run_id=task.run_id, besides=(task.id, lease.epoch, step)
        )
        new = sum(file.size for file in files)
        if sent + new > most:
            raise ResourceExhausted(
                f"files: {new:,} bytes beside {sent:,} of checkpoints that were begun and not committed are more than "
                f"{most:,}, the most that one worker may send to this run; commit those first"
            )

    def CommitCheckpoint(self, request: ws.CommitCheckpointRequest, context: Any) -> ws.CommitCheckpointResponse:
        worker_id = caller.get().id
        try:
            with self._store.reading() as tx:
                checkpoint, task = commits.committable(
                    tx,
                    checkpoint_id=request.checkpoint_id,
                    lease_id=request.lease_id,
                    epoch=request.epoch,
                    worker_id=worker_id,
                )
        except (LeaseLost, InvalidState):
            # Of a retry that comes when the checkpoint was committed, and pruned since.
            first = self._context.first_answer(request, ws.CommitCheckpointResponse)
            if first is None:
                raise
            return first
        if checkpoint.state is not CheckpointState.UPLOADING:
            return self._context.first_answer(request, ws.CommitCheckpointResponse) or ws.CommitCheckpointResponse(
                checkpoint=convert.checkpoint(checkpoint), task_state=convert.task_state(task)
            )
        try:
            sizes = self._verifier.wait(
                checkpoint.id, checkpoint.files, lambda: self._structures.begin(checkpoint, task), _COMMIT_WAIT
            )
        except IntegrityError as error:
            self._note_wrong_bytes(request, task, worker_id, error)
            raise
        except CheckpointRejected as error:
            with self._store.writing() as tx:
                rejections.reject(tx, self._store.now(), checkpoint, reason=error.message, evidence=error.metadata)
            raise
        if sizes is None:
            return ws.CommitCheckpointResponse(
                checkpoint=convert.checkpoint(checkpoint),
                retry_after=duration(_COMMIT_RETRY),
                task_state=convert.task_state(task),
            )
        point("coordinator.commit.after_verify")

        def answer(tx: Connection) -> ws.CommitCheckpointResponse:
            done, after = commits.commit(
                tx,
                self._store.now(),
                checkpoint=checkpoint,
                worker_id=worker_id,
                epoch=request.epoch,
                metrics=from_struct(request.metrics),
            )
            add_sizes(tx, done.id, sizes)
            acceptance.after_commit(tx, self._store.now(), done, after, draw=self._draw)
            point("coordinator.commit.before_commit")
            return ws.CommitCheckpointResponse(
                checkpoint=convert.checkpoint(done), task_state=convert.task_state(after)
            )

        response = self._context.once(request, ws.CommitCheckpointResponse, answer)
        point("coordinator.commit.after_commit")
        return response

    def _note_wrong_bytes(
        self, request: ws.CommitCheckpointRequest, task: TaskRecord, worker_id: str, error: IntegrityError
    ) -> None:
        with self._store.writing() as tx:
            events.append(
                tx,
                self._store.now(),
                "checkpoint.refused",
                run_id=task.run_id,
                task_id=task.id,
                lease_id=request.lease_id,
                worker_id=worker_id,
                reason=error.message,
            )

    def ReportCheck(self, request: ws.ReportCheckRequest, context: Any) -> ws.ReportCheckResponse:
        def answer(tx: Connection) -> ws.ReportCheckResponse:
            lease, task = self._held(tx, request.lease_id, request.epoch)
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
                detail=_printable(request.detail, _MAX_DETAIL),
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


def _printable(text: str, length: int) -> str:
    """The first of `text` on one line; a database takes no NUL, and a terminal should obey no worker."""
    return "".join(c if c.isprintable() else " " for c in text[:length])


def _hardware_json(hardware: pb.Hardware) -> str:
    return json.dumps(MessageToDict(hardware, preserving_proto_field_name=True) | _integers(hardware))


def _integers(hardware: pb.Hardware) -> dict[str, int]:
    """JSON has no 64-bit integers, so protobuf writes them as strings; we read them back ourselves."""
    names = ("device_memory_bytes", "memory_bytes", "free_disk_bytes")
    return {name: int(getattr(hardware, name)) for name in names}
