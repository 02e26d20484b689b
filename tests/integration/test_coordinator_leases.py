"""A worker's whole life, call by call, against a real coordinator: what it may do, what it may not, what survives."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import catalog_service_pb2 as cs
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import IntegrityError, InvalidArgument, InvalidState, LeaseLost, NotFound, PermissionDenied
from cbtm_common.files import describe, hash_file
from cbtm_common.ids import new_request_id
from cbtm_common.rpc import Connection
from cbtm_common.shards import read_shard
from tests.support.coordinator import RunningCoordinator
from tests.support.raw_run import STEPS, RawWorker, checkpoint_folder, make_run

pytestmark = pytest.mark.integration


@pytest.fixture
def run(admin: Connection, tmp_path: Path) -> Iterator[pb.Run]:
    """A fresh run of two clusters, the only one there is."""
    made = make_run(admin, tmp_path)
    yield made
    admin.admin.DeleteRun(ad.DeleteRunRequest(request_id=new_request_id(), run=made.id))


@pytest.fixture
def worker(coordinator: RunningCoordinator, run: pb.Run) -> Iterator[RawWorker]:
    with contextlib.closing(RawWorker(coordinator)) as made:
        yield made


def _status(admin: Connection, run: pb.Run) -> ad.GetRunStatusResponse:
    return admin.admin.GetRunStatus(ad.GetRunStatusRequest(run=run.id))


def _task(admin: Connection, run: pb.Run, lease: pb.Lease) -> pb.Task:
    return next(status.task for status in _status(admin, run).tasks if status.task.id == lease.task_id)


def _event_kinds(admin: Connection, run: pb.Run) -> list[str]:
    answer = admin.admin.ListEvents(ad.ListEventsRequest(run=run.id, page_size=1000))
    return [event.kind for event in answer.events]


def test_a_worker_takes_every_task_in_turn_and_the_run_is_complete(
    admin: Connection, run: pb.Run, worker: RawWorker, tmp_path: Path
) -> None:
    folder = checkpoint_folder(tmp_path / "final", final=True)
    for done in range(2):
        answer = worker.acquire()
        assert answer.spec.run.id == run.id
        assert not answer.spec.HasField("resume_from")
        shards = worker.calls.ListTaskShards(
            ws.ListTaskShardsRequest(lease_id=answer.lease.id, epoch=answer.lease.epoch)
        ).shards
        wanted = [shards[0].file, *answer.spec.base_model_files, *answer.spec.tokenizer_files]
        paths = worker.download(answer.lease, wanted, tmp_path / f"cache-{done}")
        assert [hash_file(path)[1] for path in paths] == [file.sha256 for file in wanted]
        assert read_shard(paths[0]).tokens[0] == 1 + answer.spec.task.cluster_index
        assert worker.renew(answer.lease, step=5).directive == ws.DIRECTIVE_CONTINUE
        committed = worker.save(answer.lease, STEPS, folder)
        assert committed.task_state == pb.TASK_STATE_DONE
        assert committed.checkpoint.state == pb.CHECKPOINT_STATE_ACCEPTED
        worker.release(answer.lease)
    nothing = worker.acquire()
    assert not nothing.HasField("lease")
    assert nothing.idle
    assert _status(admin, run).run.state == pb.RUN_STATE_COMPLETE
    kinds = _event_kinds(admin, run)
    assert kinds.count("task.leased") == 2
    experts = admin.catalog.ListExperts(cs.ListExpertsRequest(run="web")).experts
    assert [expert.cluster_index for expert in experts] == [-1, 0, 1]
    # Without the folder that a checkpoint keeps its model in, so that they are a model's folder.
    assert [file.path for file in experts[1].files] == ["config.json", "model.safetensors"]


def test_a_checkpoint_is_seen_only_once_it_is_committed(
    coordinator: RunningCoordinator, admin: Connection, run: pb.Run, worker: RawWorker, tmp_path: Path
) -> None:
    lease = worker.lease()
    prepared = worker.upload(lease, 4, checkpoint_folder(tmp_path / "four"))
    worker.release(lease, ws.RELEASE_REASON_PREEMPTED)
    with contextlib.closing(RawWorker(coordinator, name="second")) as second:
        answer = second.acquire()
        while answer.lease.task_id != lease.task_id:
            answer = second.acquire()
        assert not answer.spec.HasField("resume_from")
        committed = second.save(answer.lease, 4, checkpoint_folder(tmp_path / "four again"))
        assert committed.checkpoint.id != prepared.checkpoint.id
        second.release(answer.lease, ws.RELEASE_REASON_PREEMPTED)
        again = second.acquire()
        while again.lease.task_id != lease.task_id:
            again = second.acquire()
        assert again.spec.resume_from.id == committed.checkpoint.id
        assert again.spec.resume_from.step == 4
        paths = second.download(again.lease, again.spec.resume_from.files, tmp_path / "resumed")
        assert len(paths) == 4


def test_a_commit_without_the_bytes_is_refused(run: pb.Run, worker: RawWorker, tmp_path: Path) -> None:
    lease = worker.lease()
    files = [spec.to_proto() for spec in describe(checkpoint_folder(tmp_path / "c"))]
    prepared = worker.prepare(lease, 3, files)
    with pytest.raises(NotFound):
        worker.commit(lease, prepared.checkpoint.id)


def test_wrong_bytes_are_refused_at_the_commit_and_the_right_ones_can_still_be_sent(
    coordinator: RunningCoordinator, admin: Connection, run: pb.Run, worker: RawWorker, tmp_path: Path
) -> None:
    lease = worker.lease()
    folder = checkpoint_folder(tmp_path / "final", final=True)
    prepared = worker.upload(lease, STEPS, folder)
    # A disk that lies: other bytes of the same length, where the store does not remember a digest.
    objects = coordinator.data_dir / "objects"
    (damaged,) = objects.rglob(f"{lease.task_id}/*/s{STEPS:010d}/model/model.safetensors")
    damaged.write_bytes(bytes(damaged.stat().st_size))
    for digest in (objects / "digests").rglob("*"):
        if digest.is_file():
            digest.unlink()
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        worker.commit(lease, prepared.checkpoint.id)
    assert "checkpoint.refused" in _event_kinds(admin, run)
    assert _task(admin, run, lease).state == pb.TASK_STATE_LEASED
    again = worker.prepare(lease, STEPS, [spec.to_proto() for spec in describe(folder)])
    missing = [upload for upload in again.uploads if not upload.stored]
    assert [upload.file.path for upload in missing] == ["model/model.safetensors"]
    for upload in missing:
        worker.transfer.upload(upload, folder / upload.file.path)
    assert worker.commit(lease, again.checkpoint.id).task_state == pb.TASK_STATE_DONE


_BAD_PATHS = [
    "",
    "/etc/passwd",
    "../state.json",
    "model/../../state.json",
    "model/./model.safetensors",
    "model//model.safetensors",
    "model\\model.safetensors",
    "model/sub/model.safetensors",
    "model/evil.py",
    "model/pytorch_model.bin",
    "C:state.json",
    "state.json\0",
    "state.json/",
    "other.json",
]
_BAD_FILES = {
    "files: 0 given": [],
    "empty": [pb.FileSpec(path="state.json", size=0, sha256="0" * 64)],
    "-5 bytes": [pb.FileSpec(path="state.json", size=-5, sha256="0" * 64)],
    "sha256": [pb.FileSpec(path="state.json", size=1, sha256="A" * 64)],
    "64 lower-case": [pb.FileSpec(path="state.json", size=1, sha256="0" * 63)],
    "twice": [pb.FileSpec(path="state.json", size=1, sha256="0" * 64)] * 2,
}


def _refusal(worker: RawWorker, lease: pb.Lease, files: list[pb.FileSpec]) -> str:
    """What the coordinator says to a checkpoint of these files; empty when it takes them."""
    try:
        worker.prepare(lease, 3, files)
    except InvalidArgument as error:
        return error.message
    return ""


def test_a_checkpoint_holds_nothing_but_its_own_files(
    coordinator: RunningCoordinator, run: pb.Run, worker: RawWorker
) -> None:
    lease = worker.lease()
    for path in _BAD_PATHS:
        assert _refusal(worker, lease, [pb.FileSpec(path=path, size=1, sha256="0" * 64)]), f"{path!r} was accepted"
    for message, files in _BAD_FILES.items():
        assert message in _refusal(worker, lease, files)
    assert not list((coordinator.data_dir / "objects").rglob(f"{lease.task_id}/**/*.json"))


def test_a_step_outside_of_the_task_is_refused(run: pb.Run, worker: RawWorker, tmp_path: Path) -> None:
    lease = worker.lease()
    files = [spec.to_proto() for spec in describe(checkpoint_folder(tmp_path / "c"))]
    for step in (-1, 0, STEPS + 1):
        with pytest.raises((InvalidArgument, InvalidState)):
            worker.prepare(lease, step, files)


def test_a_worker_whose_task_was_taken_away_can_write_nothing_any_more(
    coordinator: RunningCoordinator, admin: Connection, run: pb.Run, worker: RawWorker, tmp_path: Path
) -> None:
    lease = worker.lease()
    folder = checkpoint_folder(tmp_path / "c", final=True)
    prepared = worker.upload(lease, STEPS, folder)
    index = _task(admin, run, lease).cluster_index
    admin.admin.RequeueTask(
        ad.RequeueTaskRequest(request_id=new_request_id(), run=run.id, cluster_index=index, from_start=True)
    )
    files = [spec.to_proto() for spec in describe(folder)]
    keys = [upload.file.key for upload in prepared.uploads]
    for refused in (
        lambda: worker.renew(lease),
        lambda: worker.prepare(lease, STEPS, files),
        lambda: worker.commit(lease, prepared.checkpoint.id),
        lambda: worker.release(lease),
        lambda: worker.calls.ListTaskShards(ws.ListTaskShardsRequest(lease_id=lease.id, epoch=lease.epoch)),
        lambda: worker.calls.PrepareDownload(
            ws.PrepareDownloadRequest(lease_id=lease.id, epoch=lease.epoch, keys=keys)
        ),
    ):
        with pytest.raises(LeaseLost):
            refused()
    with contextlib.closing(RawWorker(coordinator, name="successor")) as successor:
        taken = successor.lease()
        while taken.task_id != lease.task_id:
            taken = successor.lease()
        assert taken.epoch > lease.epoch
        assert successor.save(taken, STEPS, folder).task_state == pb.TASK_STATE_DONE


def test_an_epoch_that_was_never_given_is_refused(run: pb.Run, worker: RawWorker) -> None:
    lease = worker.lease()
    for epoch in (lease.epoch + 1, 0, -1):
        forged = pb.Lease(id=lease.id, epoch=epoch, task_id=lease.task_id)
        with pytest.raises(LeaseLost):
            worker.renew(forged)
    with pytest.raises((LeaseLost, NotFound)):
        worker.renew(pb.Lease(id="lease_of_nobody", epoch=1))


def test_a_lease_is_its_workers_alone(coordinator: RunningCoordinator, run: pb.Run, worker: RawWorker) -> None:
    lease = worker.lease()
    with contextlib.closing(RawWorker(coordinator, name="thief")) as thief:
        for stolen in (thief.renew, thief.release):
            with pytest.raises((LeaseLost, PermissionDenied, NotFound)):
                stolen(lease)
    assert worker.renew(lease).lease.id == lease.id


def test_a_worker_reads_its_own_training_shards_and_no_others(
    admin: Connection, run: pb.Run, worker: RawWorker
) -> None:
    answer = worker.acquire()
    lease, own = answer.lease, answer.spec.task.cluster_id
    listed = worker.calls.ListTaskShards(ws.ListTaskShardsRequest(lease_id=lease.id, epoch=lease.epoch)).shards
    assert [(shard.cluster_id, shard.split) for shard in listed] == [(own, pb.SPLIT_TRAIN)]
    shards = admin.catalog.ListShards(cs.ListShardsRequest(run=run.id)).shards
    assert len(shards) == 4
    forbidden = [s for s in shards if s.split == pb.SPLIT_HELD_OUT or s.cluster_id != own]
    assert len(forbidden) == 3
    for shard in forbidden:
        # Alone, and hidden among keys that it may read.
        for keys in ([shard.file.key], [listed[0].file.key, shard.file.key]):
            request = ws.PrepareDownloadRequest(lease_id=lease.id, epoch=lease.epoch, keys=keys)
            with pytest.raises(NotFound):
                worker.calls.PrepareDownload(request)


def test_too_many_keys_at_once_are_refused(run: pb.Run, worker: RawWorker) -> None:
    lease = worker.lease()
    request = ws.PrepareDownloadRequest(lease_id=lease.id, epoch=lease.epoch, keys=["k"] * 257)
    with pytest.raises(InvalidArgument, match="256"):
        worker.calls.PrepareDownload(request)


def test_a_repeated_request_gets_the_first_answer(
    admin: Connection, run: pb.Run, worker: RawWorker, tmp_path: Path
) -> None:
    asked = new_request_id()
    first = worker.acquire(asked)
    assert worker.acquire(asked) == first
    lease = first.lease
    prepared = worker.upload(lease, STEPS, checkpoint_folder(tmp_path / "c", final=True))
    committing, releasing = new_request_id(), new_request_id()
    committed = worker.commit(lease, prepared.checkpoint.id, request_id=committing)
    assert worker.commit(lease, prepared.checkpoint.id, request_id=committing) == committed
    released = worker.release(lease, request_id=releasing)
    # Also once the lease is over, when the same call made anew would be refused.
    assert worker.release(lease, request_id=releasing) == released
    assert worker.commit(lease, prepared.checkpoint.id, request_id=committing) == committed
    assert _event_kinds(admin, run).count("task.leased") == 1


def test_many_threads_with_one_request_get_one_lease(admin: Connection, run: pb.Run, worker: RawWorker) -> None:
    asked = new_request_id()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: worker.acquire(asked), range(8)))
    assert {answer.lease.id for answer in answers} == {answers[0].lease.id}
    assert answers[0].lease.id
    assert _event_kinds(admin, run).count("task.leased") == 1


def test_many_workers_at_once_never_share_a_task(coordinator: RunningCoordinator, run: pb.Run) -> None:
    with contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(contextlib.closing(RawWorker(coordinator, name=f"w{i}"))) for i in range(8)]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda worker: worker.acquire(), crowd))
    taken = [answer.lease.task_id for answer in answers if answer.HasField("lease")]
    assert len(taken) == 2
    assert len(set(taken)) == 2
    assert all(answer.HasField("retry_after") for answer in answers if not answer.HasField("lease"))


def test_a_mutation_without_a_request_id_is_refused(run: pb.Run, worker: RawWorker) -> None:
    for bad in ("", "x" * 65):
        with pytest.raises(InvalidArgument, match="request_id"):
            worker.calls.AcquireLease(ws.AcquireLeaseRequest(request_id=bad))


def test_a_release_says_why(run: pb.Run, worker: RawWorker) -> None:
    lease = worker.lease()
    with pytest.raises(InvalidArgument, match="release_reason"):
        worker.release(lease, ws.RELEASE_REASON_UNSPECIFIED)


def test_a_worker_that_failed_waits_before_it_is_given_work_again_and_status_says_why(
    coordinator: RunningCoordinator, admin: Connection, run: pb.Run, worker: RawWorker
) -> None:
    lease = worker.lease()
    worker.release(lease, ws.RELEASE_REASON_FAILED)
    assert _task(admin, run, lease).attempts == 1
    answer = worker.acquire()
    assert not answer.HasField("lease")
    assert answer.retry_after.ToTimedelta().total_seconds() > 0
    assert "1 failure(s) in a row of this worker; waits 15 s" in answer.reason
    (waiting,) = [w for w in _status(admin, run).waiting_workers if w.id == worker.id]
    assert waiting.reason == answer.reason
    shown = coordinator.coord("status", "web")
    assert f"{waiting.name}: {waiting.reason}" in " ".join(shown.stdout.split())


def test_a_paused_run_tells_its_workers_to_stop_and_gives_nothing_out(
    coordinator: RunningCoordinator, admin: Connection, run: pb.Run, worker: RawWorker
) -> None:
    lease = worker.lease()
    admin.admin.PauseRun(ad.PauseRunRequest(request_id=new_request_id(), run=run.id))
    told = worker.renew(lease)
    assert told.directive == ws.DIRECTIVE_STOP
    assert "paused" in told.reason
    worker.release(lease, ws.RELEASE_REASON_PREEMPTED)
    assert not worker.acquire().HasField("lease")
    admin.admin.ResumeRun(ad.ResumeRunRequest(request_id=new_request_id(), run=run.id))
    assert worker.acquire().HasField("lease")


def test_a_revoked_worker_is_shown_the_door_with_the_reason(
    coordinator: RunningCoordinator, admin: Connection, run: pb.Run, worker: RawWorker
) -> None:
    lease = worker.lease()
    revoke = ad.RevokeWorkerRequest(request_id=new_request_id(), worker_id=worker.id, reason="sends rubbish")
    admin.admin.RevokeWorker(revoke)
    with pytest.raises(LeaseLost, match="sends rubbish"):
        worker.renew(lease)
    with pytest.raises(PermissionDenied, match="sends rubbish"):
        worker.acquire()
    with contextlib.closing(RawWorker(coordinator, name="other")) as other:
        taken = {other.lease().task_id, other.lease().task_id}
    assert lease.task_id in taken


@pytest.mark.parametrize("speed", [float("nan"), float("inf"), -1.0, 1e-320])
def test_a_worker_that_reports_rubbish_breaks_no_status(
    coordinator: RunningCoordinator, admin: Connection, run: pb.Run, worker: RawWorker, speed: float
) -> None:
    lease = worker.lease()
    progress = pb.Progress(step=3, loss=float("nan"), tokens_per_second=speed, phase="nul\0 \x1b[31m")
    worker.calls.RenewLease(ws.RenewLeaseRequest(lease_id=lease.id, epoch=lease.epoch, progress=progress))
    assert not _status(admin, run).HasField("estimated_remaining")
    shown = coordinator.coord("status", "web", "--json")
    assert shown.returncode == 0, shown.stderr

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (task,) = [t for t in json.loads(shown.stdout, parse_constant=refuse)["tasks"] if t["worker"]]
    assert task["loss"] is None
    assert task["phase"] == "nul   [31m"
