"""Every mutation, called twice with one request: the retry gets the first answer, and changes nothing more.

Walks all methods of all services: one that takes a `request_id` and has no scene here fails, so that the list stays
complete.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import Message

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import catalog_service_pb2 as cs
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import CbtmError
from cbtm_common.files import describe
from cbtm_common.ids import new_request_id
from cbtm_common.keys import new_key, public_key_of, registration_text, sign
from cbtm_common.rpc import Connection
from tests.support.coordinator import RunningCoordinator
from tests.support.raw_run import (
    RECIPE,
    STEPS,
    RawWorker,
    calibrated,
    checkpoint_folder,
    create_run,
    make_run,
    new_clusters,
)

pytestmark = pytest.mark.integration

_METHODS = {
    method.name: method
    for module in (ws, cs, ad)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if "request_id" in method.input_type.fields_by_name
}
# A renewal repeated is a renewal: it lasts from when it came last. And who asks for work was heard of. What may differ
# is only when.
_SAME_BUT_FOR_TIME = {"RenewLease", "AcquireLease"}
# Signatures are made anew, and say when they end; what they are for is the same.
_SAME_BUT_FOR_SIGNATURES = {"PrepareUpload", "PrepareRunUpload"}


class Scene:
    """A coordinator with a run, and who calls."""

    def __init__(self, coordinator: RunningCoordinator, admin: Connection, folder: Path) -> None:
        self.coordinator = coordinator
        self.admin = admin.admin
        self.connection = admin
        self.folder = folder
        self.stack = contextlib.ExitStack()
        self._numbers = iter(range(1000))

    def run(self, **options: Any) -> pb.Run:
        number = next(self._numbers)
        made = make_run(
            self.connection, self.folder, name=f"run-{self.folder.name[-8:]}-{number}", clusters=1, **options
        )
        self.stack.callback(self.delete, made.id)
        return made

    def draft(self) -> pb.Run:
        made = create_run(self.connection, name=f"draft-{self.folder.name[-8:]}", clusters=1)
        self.stack.callback(self.delete, made.id)
        return made

    def delete(self, run: str) -> None:
        with contextlib.suppress(CbtmError):
            self.admin.DeleteRun(ad.DeleteRunRequest(request_id=new_request_id(), run=run))

    def worker(self) -> RawWorker:
        made = self.stack.enter_context(contextlib.closing(RawWorker(self.coordinator)))
        # Asked for now, which notes the time of what was signed.
        assert made.bearer
        return made

    def held(self) -> tuple[RawWorker, dict[str, Any], pb.Lease]:
        self.run()
        worker = self.worker()
        lease = worker.lease()
        return worker, {"lease_id": lease.id, "epoch": lease.epoch}, lease


Call = tuple[Callable[[Any], Any], Message]


def _register(scene: Scene) -> Call:
    connection = scene.stack.enter_context(scene.coordinator.connect(scene.coordinator.token("join")))
    key = new_key()

    def call(request: ws.RegisterRequest) -> ws.RegisterResponse:
        # The proof is of the request's own id.
        request.proof = sign(key, registration_text(request.request_id, request.public_key))
        return connection.worker.Register(request)

    return call, ws.RegisterRequest(name="gpu", version="0.1.0", public_key=public_key_of(key))


def _acquire(scene: Scene) -> Call:
    scene.run()
    return scene.worker().calls.AcquireLease, ws.AcquireLeaseRequest()


def _renew(scene: Scene) -> Call:
    worker, held, _ = scene.held()
    return worker.calls.RenewLease, ws.RenewLeaseRequest(progress=pb.Progress(step=1), **held)


def _prepare(scene: Scene) -> Call:
    worker, held, _ = scene.held()
    files = [spec.to_proto() for spec in describe(checkpoint_folder(scene.folder / "c"))]
    return worker.calls.PrepareUpload, ws.PrepareUploadRequest(step=3, files=files, **held)


def _commit(scene: Scene) -> Call:
    worker, held, lease = scene.held()
    prepared = worker.upload(lease, STEPS, checkpoint_folder(scene.folder / "c", final=True))
    return worker.calls.CommitCheckpoint, ws.CommitCheckpointRequest(checkpoint_id=prepared.checkpoint.id, **held)


def _report_check(scene: Scene) -> Call:
    made = scene.run()
    trusted = pb.VERIFICATION_TRUSTED
    scene.admin.SetVerification(
        ad.SetVerificationRequest(request_id=new_request_id(), run=made.id, verification=trusted)
    )
    trainer = scene.worker()
    trainer.save(trainer.lease(), STEPS, checkpoint_folder(scene.folder / "c", final=True))
    token = scene.admin.CreateToken(
        ad.CreateTokenRequest(request_id=new_request_id(), role=pb.TOKEN_ROLE_WORKER, account="owner", trusted=True)
    )
    evaluator = scene.stack.enter_context(contextlib.closing(RawWorker(scene.coordinator, token=token.secret)))
    acquire = ws.AcquireLeaseRequest(request_id=new_request_id(), run=made.id, kinds=[pb.TASK_KIND_EVALUATE])
    lease = evaluator.calls.AcquireLease(acquire).lease
    score = ws.Score(sequences=1, base_loss=4.0, loss=3.0, loss_deviation=0.1, gain_deviation=0.1)
    return evaluator.calls.ReportCheck, ws.ReportCheckRequest(
        lease_id=lease.id, epoch=lease.epoch, evaluation=ws.EvaluationReport(own=score, train=score)
    )


def _release(scene: Scene) -> Call:
    worker, held, _ = scene.held()
    return worker.calls.ReleaseLease, ws.ReleaseLeaseRequest(release_reason=ws.RELEASE_REASON_PREEMPTED, **held)


def _create_run(scene: Scene) -> Call:
    name = f"made-{scene.folder.name[-8:]}"
    scene.stack.callback(scene.delete, name)
    return scene.admin.CreateRun, ad.CreateRunRequest(name=name, cluster_count=1, recipe_json=RECIPE.to_json())


def _prepare_run_upload(scene: Scene) -> Call:
    files = [spec.to_proto() for spec in describe(checkpoint_folder(scene.folder / "c"))][:1]
    files[0].path = "state.json"
    request = ad.PrepareRunUploadRequest(run_id=scene.draft().id, kind=ad.RUN_FILE_KIND_REPORT, files=files)
    return scene.admin.PrepareRunUpload, request


def _register_clusters(scene: Scene) -> Call:
    draft = scene.draft()
    new = new_clusters(scene.connection, draft, scene.folder / "shards")
    return scene.admin.RegisterClusters, ad.RegisterClustersRequest(run_id=draft.id, clusters=new)


def _start_run(scene: Scene) -> Call:
    made = scene.run(start=False)
    return scene.admin.StartRun, ad.StartRunRequest(run_id=made.id, model_parameters=25)


def _create_baseline(scene: Scene) -> Call:
    made = scene.run()
    scene.stack.callback(scene.delete, f"{made.name}-dense")
    return scene.admin.CreateBaseline, ad.CreateBaselineRequest(run=made.id)


def _pause(scene: Scene) -> Call:
    return scene.admin.PauseRun, ad.PauseRunRequest(run=scene.run().id)


def _resume(scene: Scene) -> Call:
    made = scene.run()
    scene.admin.PauseRun(ad.PauseRunRequest(request_id=new_request_id(), run=made.id))
    return scene.admin.ResumeRun, ad.ResumeRunRequest(run=made.id)


def _set_routing(scene: Scene) -> Call:
    made = scene.run()
    routing = calibrated(scene.connection, made)
    return scene.admin.SetRunRouting, ad.SetRunRoutingRequest(run=made.id, routing_json=routing.to_json())


def _set_verification(scene: Scene) -> Call:
    verification = pb.VERIFICATION_PEERS
    return scene.admin.SetVerification, ad.SetVerificationRequest(run=scene.run().id, verification=verification)


def _delete(scene: Scene) -> Call:
    return scene.admin.DeleteRun, ad.DeleteRunRequest(run=scene.run().id)


def _requeue(scene: Scene) -> Call:
    return scene.admin.RequeueTask, ad.RequeueTaskRequest(run=scene.run().id, cluster_index=0, from_start=True)


def _revoke_worker(scene: Scene) -> Call:
    return scene.admin.RevokeWorker, ad.RevokeWorkerRequest(worker_id=scene.worker().id, reason="a test")


def _recover_worker(scene: Scene) -> Call:
    return scene.admin.RecoverWorker, ad.RecoverWorkerRequest(worker_id=scene.worker().id)


def _create_token(scene: Scene) -> Call:
    return scene.admin.CreateToken, ad.CreateTokenRequest(role=pb.TOKEN_ROLE_WORKER, label="lab")


def _revoke_token(scene: Scene) -> Call:
    made = scene.admin.CreateToken(ad.CreateTokenRequest(request_id=new_request_id(), role=pb.TOKEN_ROLE_CONSUMER))
    return scene.admin.RevokeToken, ad.RevokeTokenRequest(token_id=made.token.id)


# What is signed names a later time than the last, so that a repeated one is refused (`test_identity`).
_ONCE_BY_SIGNATURE = {"IssueCredential"}

_SCENES: dict[str, Callable[[Scene], Call]] = {
    "Register": _register,
    "AcquireLease": _acquire,
    "RenewLease": _renew,
    "PrepareUpload": _prepare,
    "CommitCheckpoint": _commit,
    "ReportCheck": _report_check,
    "ReleaseLease": _release,
    "CreateRun": _create_run,
    "PrepareRunUpload": _prepare_run_upload,
    "RegisterClusters": _register_clusters,
    "StartRun": _start_run,
    "CreateBaseline": _create_baseline,
    "PauseRun": _pause,
    "ResumeRun": _resume,
    "SetRunRouting": _set_routing,
    "SetVerification": _set_verification,
    "DeleteRun": _delete,
    "RequeueTask": _requeue,
    "RevokeWorker": _revoke_worker,
    "RecoverWorker": _recover_worker,
    "CreateToken": _create_token,
    "RevokeToken": _revoke_token,
}


@pytest.fixture
def scene(coordinator: RunningCoordinator, admin: Connection, tmp_path: Path) -> Iterator[Scene]:
    made = Scene(coordinator, admin, tmp_path)
    with made.stack:
        yield made


def _rows(coordinator: RunningCoordinator) -> dict[str, list[tuple[Any, ...]]]:
    """What a mutation may change: every row but for the record of requests and for when somebody was last seen."""
    with contextlib.closing(sqlite3.connect(coordinator.data_dir / "registry.db")) as database:
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            name: sorted(database.execute(f"SELECT * FROM {name}"), key=repr)  # names of our own tables
            for name in names
            if name != "requests"
        }


def _comparable(method: str, answer: Message) -> Message:
    """The answer without what may differ."""
    if method == "RenewLease":
        answer.lease.ClearField("expire_time")
    if method in _SAME_BUT_FOR_SIGNATURES:
        for upload in answer.uploads:
            upload.request.ClearField("url")
            upload.request.ClearField("expire_time")
    return answer


def test_there_is_a_scene_for_every_mutation_and_for_nothing_else() -> None:
    assert set(_SCENES) == set(_METHODS)


def test_what_takes_no_request_id_is_a_question() -> None:
    """So that no mutation can be added without one: a method is a question by its name, or it is listed above."""
    # A receipt says what the ledger says; asking again signs it again.
    questions = ("Get", "List", "Route", "Probe", "PrepareDownload", "IssueReceipt")
    for module in (ws, cs, ad):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                if method.name not in _ONCE_BY_SIGNATURE:
                    assert (method.name in _METHODS) != method.name.startswith(questions), method.full_name


@pytest.mark.parametrize("name", list(_METHODS))
def test_a_retry_gets_the_first_answer_and_changes_nothing_more(
    name: str, scene: Scene, coordinator: RunningCoordinator
) -> None:
    call, request = _SCENES[name](scene)
    request.request_id = new_request_id()  # type: ignore[attr-defined]
    first = call(request)
    between = _rows(coordinator)
    # After a crash too: the record of answers lies where the change does.
    again = call(request)
    assert _comparable(name, again) == _comparable(name, first)
    after = _rows(coordinator)
    if name in _SAME_BUT_FOR_TIME:
        assert {table: len(rows) for table, rows in after.items()} == {t: len(r) for t, r in between.items()}
    else:
        assert after == between


@pytest.mark.parametrize("name", sorted(set(_METHODS) - {"RenewLease"} - _SAME_BUT_FOR_SIGNATURES))
def test_without_a_request_id_it_is_refused_and_changes_nothing(
    name: str, scene: Scene, coordinator: RunningCoordinator
) -> None:
    call, request = _SCENES[name](scene)
    before = _rows(coordinator)
    with pytest.raises(CbtmError, match="request_id"):
        call(request)
    assert _rows(coordinator) == before
