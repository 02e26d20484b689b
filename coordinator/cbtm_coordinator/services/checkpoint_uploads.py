"""Checkpoints on their way in: announced and signed for, then checked object by object and committed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import timedelta

from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import CheckpointRejected, IntegrityError, InvalidState, LeaseLost, ResourceExhausted
from cbtm_common.faults import point
from cbtm_common.files import FileSpec
from cbtm_common.protos import duration, from_struct
from cbtm_coordinator.lifecycle import CHECKING, CheckpointState
from cbtm_coordinator.services import convert
from cbtm_coordinator.services.auth import caller
from cbtm_coordinator.services.commit import Verifier
from cbtm_coordinator.services.context import ServiceContext, checked_files
from cbtm_coordinator.services.structure import Structures, add_sizes
from cbtm_coordinator.store import Connection, acceptance, checkpoints, commits, events, leases, rejections, runs
from cbtm_coordinator.store.records import LeaseRecord, TaskRecord
from cbtm_coordinator.structure.manifest import check_paths

_MAX_FILES = 4096
# A call waits this long for the check of a checkpoint; the worker then asks again after the other.
_COMMIT_WAIT = 8.0
_COMMIT_RETRY = timedelta(seconds=2)


class CheckpointUploads:
    """Prepares and commits them; `verifier` reads the objects, `structures` judges what they hold."""

    def __init__(self, context: ServiceContext, verifier: Verifier, structures: Structures) -> None:
        self._context = context
        self._store = context.store
        self._verifier = verifier
        self._structures = structures
        # Nobody can foresee which segments are audited.
        self._draw = random.SystemRandom().random

    def prepare(self, request: ws.PrepareUploadRequest) -> ws.PrepareUploadResponse:
        with self._store.writing(by_statement=True) as tx:
            lease, task = leases.require(tx, request.lease_id, request.epoch, caller.get().id)
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

    def commit(self, request: ws.CommitCheckpointRequest) -> ws.CommitCheckpointResponse:
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
