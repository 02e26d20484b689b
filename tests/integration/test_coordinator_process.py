"""The coordinator as a process: killed, told to stop, started twice, started wrongly."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import catalog_service_pb2 as cs
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_api.v1 import worker_service_pb2_grpc
from cbtm_common.errors import CbtmError, IntegrityError, Unavailable
from cbtm_common.ids import new_request_id
from cbtm_common.keys import new_key
from cbtm_common.recipe import LeaseRecipe
from cbtm_common.security import split_token
from tests.support.coordinator import RunningCoordinator, coord, running_coordinator
from tests.support.raw_run import RECIPE, STEPS, RawWorker, checkpoint_folder, create_run, make_run, register_request

pytestmark = pytest.mark.integration


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[RunningCoordinator]:
    with running_coordinator(tmp_path) as running:
        yield running


def _until(condition: object, seconds: float = 20.0) -> None:
    pause = threading.Event()
    for _ in range(int(seconds / 0.05)):
        if condition():  # type: ignore[operator]
            return
        pause.wait(0.05)
    raise AssertionError(f"did not happen within {seconds} s")


def test_kill_9_between_any_two_calls_loses_nothing(coordinator: RunningCoordinator, tmp_path: Path) -> None:
    def crash() -> None:
        coordinator.kill()
        coordinator.start()

    folder = checkpoint_folder(tmp_path / "final", final=True)
    with coordinator.connect(coordinator.token("admin")) as admin:
        run = make_run(admin, tmp_path, clusters=1)
        crash()
        with contextlib.closing(RawWorker(coordinator)) as worker:
            asked = new_request_id()
            answer = worker.acquire(asked)
            crash()
            assert worker.acquire(asked) == answer
            lease = answer.lease
            prepared = worker.upload(lease, STEPS, folder)
            crash()
            again = worker.upload(lease, STEPS, folder)
            assert again.checkpoint.id == prepared.checkpoint.id
            assert all(upload.stored for upload in again.uploads)
            committing = new_request_id()
            committed = worker.commit(lease, prepared.checkpoint.id, request_id=committing)
            crash()
            assert worker.commit(lease, prepared.checkpoint.id, request_id=committing) == committed
            worker.release(lease)
            crash()
            assert worker.acquire().idle
        assert admin.catalog.GetRun(cs.GetRunRequest(run=run.id)).run.state == pb.RUN_STATE_COMPLETE


def test_a_lease_whose_worker_vanished_goes_to_another_also_over_a_restart(
    coordinator: RunningCoordinator, tmp_path: Path
) -> None:
    short = RECIPE.model_copy(update={"lease": LeaseRecipe(lease_seconds=2, renew_seconds=0.2)})
    with coordinator.connect(coordinator.token("admin")) as admin:
        run = make_run(admin, tmp_path, clusters=1, recipe=short)
        with contextlib.closing(RawWorker(coordinator, name="vanishes")) as vanishing:
            lease = vanishing.lease()
        coordinator.kill()
        coordinator.start()
        with contextlib.closing(RawWorker(coordinator, name="stays")) as staying:
            taken: list[ws.AcquireLeaseResponse] = []

            def try_again() -> bool:
                taken.append(staying.acquire())
                return taken[-1].HasField("lease")

            _until(try_again)
            assert taken[-1].lease.task_id == lease.task_id
            assert taken[-1].lease.epoch > lease.epoch
        status = admin.admin.GetRunStatus(ad.GetRunStatusRequest(run=run.id))
        # A machine that vanishes says nothing about the task.
        assert status.tasks[0].task.attempts == 0
        events = admin.admin.ListEvents(ad.ListEventsRequest(run=run.id, page_size=1000)).events
        assert [event.kind for event in events].count("lease.expired") == 1


def test_sigterm_drains_and_leaves_with_0(coordinator: RunningCoordinator) -> None:
    with coordinator.channel() as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=""), timeout=60)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        coordinator.process.send_signal(signal.SIGTERM)
        # Told while it still serves those that are on their way out; this watcher is the last of them.
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert coordinator.process.poll() is None
        watch.cancel()
    assert coordinator.wait() == 0
    assert "stopping" in coordinator.log
    assert "Traceback" not in coordinator.log


def test_no_call_in_progress_is_lost_when_it_stops(coordinator: RunningCoordinator) -> None:
    """Calls either are answered, or fail as something that is worth another try."""
    stopped = threading.Event()

    def call_until_stopped(_: int) -> list[CbtmError]:
        failures: list[CbtmError] = []
        with coordinator.connect(coordinator.token("admin"), attempts=1) as admin:
            while not stopped.is_set() and not failures:
                try:
                    admin.admin.ListWorkers(ad.ListWorkersRequest())
                except CbtmError as error:
                    failures.append(error)
        return failures

    with ThreadPoolExecutor(4) as pool:
        calling = [pool.submit(call_until_stopped, number) for number in range(4)]
        assert coordinator.stop() == 0
        stopped.set()
        failures = [error for one in calling for error in one.result(20)]
    assert all(isinstance(error, Unavailable) for error in failures), failures


def test_a_registry_that_does_not_answer_keeps_nobody_from_stopping(tmp_path: Path) -> None:
    """What writes waits half a minute for SQLite's lock; so long the process would wait for its threads."""
    with (
        running_coordinator(tmp_path, CBTM_DRAIN_SECONDS="1") as coordinator,
        coordinator.channel() as channel,
        contextlib.closing(sqlite3.connect(coordinator.data_dir / "registry.db", isolation_level=None)) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        call = worker_service_pb2_grpc.WorkerServiceStub(channel).Register.future(
            register_request(new_key(), name="gpu", version="0.1.0"),
            timeout=60,
            metadata=(("authorization", f"Bearer {split_token(coordinator.token('join'))[0]}"),),
        )
        with pytest.raises(grpc.FutureTimeoutError):
            call.result(timeout=2)  # It waits for the lock by then.
        asked = time.monotonic()
        assert coordinator.stop() == 0
        assert time.monotonic() - asked < 20
        assert isinstance(call.exception(), grpc.RpcError)


def test_ctrl_c_ends_it_like_sigterm(coordinator: RunningCoordinator) -> None:
    coordinator.process.send_signal(signal.SIGINT)
    assert coordinator.wait() == 0
    assert "Traceback" not in coordinator.log


def test_after_a_stop_it_comes_back_on_the_same_ports_at_once(coordinator: RunningCoordinator) -> None:
    ports = coordinator.port, coordinator.http_port
    assert coordinator.stop() == 0
    coordinator.start()
    assert (coordinator.port, coordinator.http_port) == ports
    with coordinator.connect(coordinator.token("admin")) as admin:
        assert not admin.catalog.ListRuns(cs.ListRunsRequest()).runs


def test_it_says_where_it_is_and_how_to_join(coordinator: RunningCoordinator) -> None:
    assert (coordinator.data_dir / "coordinator.address").read_text().strip() == coordinator.target
    with coordinator.connect(coordinator.token("admin")) as admin:
        admin.catalog.ListRuns(cs.ListRunsRequest())
        # Told with every answer, since signed URLs are paths only.
        assert admin.http_base == f"https://127.0.0.1:{coordinator.http_port}"
        assert httpx.get(f"{admin.http_base}/healthz", verify=admin.http_context()).status_code == 200


def test_a_port_in_use_is_one_clear_line(coordinator: RunningCoordinator) -> None:
    base = ["serve", "--host", "127.0.0.1"]
    for taken, hint in (
        (["--port", str(coordinator.port), "--http-port", "0"], "--port takes another"),
        (["--port", "0", "--http-port", str(coordinator.http_port)], "--http-port takes another"),
    ):
        failed = coordinator.coord(*base, *taken)
        assert failed.returncode == 1
        assert hint in failed.stderr
        assert "Traceback" not in failed.stderr
    with coordinator.connect(coordinator.token("admin")) as admin:
        admin.catalog.ListRuns(cs.ListRunsRequest())


def test_a_folder_that_was_never_made_ready_is_one_clear_line(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        failed = coord("serve", "--port", "0", "--http-port", "0", data_dir=folder)
        assert failed.returncode == 1
        assert "cbtm-coord init" in failed.stderr
        assert failed.stderr.count("\n") == 1


def test_init_can_be_run_again_and_changes_no_secret(coordinator: RunningCoordinator) -> None:
    before = {path.name: path.read_bytes() for path in coordinator.data_dir.glob("*.token")}
    assert len(before) == 2
    again = coordinator.coord("init")
    assert again.returncode == 0, again.stderr
    assert "ready already" in again.stdout
    assert {path.name: path.read_bytes() for path in coordinator.data_dir.glob("*.token")} == before


def test_a_registry_of_another_version_is_not_touched(coordinator: RunningCoordinator) -> None:
    coordinator.stop()
    with contextlib.closing(sqlite3.connect(coordinator.data_dir / "registry.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'of-the-future'")
    failed = coordinator.coord("serve", "--port", "0", "--http-port", "0")
    assert failed.returncode == 1
    assert "of-the-future" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_clusters_whose_shards_did_not_land_are_not_registered(coordinator: RunningCoordinator, tmp_path: Path) -> None:
    with coordinator.connect(coordinator.token("admin")) as admin:
        run = create_run(admin, clusters=1)
        digest = hashlib.sha256(b"never sent").hexdigest()
        file = pb.FileSpec(path=f"{digest}.safetensors", size=10, sha256=digest)
        shards = [
            ad.NewShard(split=split, ordinal=0, file=file, tokens=20, documents=1)
            for split in (pb.SPLIT_TRAIN, pb.SPLIT_HELD_OUT)
        ]
        cluster = ad.NewCluster(index=0, documents=2, shards=shards)
        with pytest.raises((CbtmError, IntegrityError), match=digest):
            admin.admin.RegisterClusters(
                ad.RegisterClustersRequest(request_id=new_request_id(), run_id=run.id, clusters=[cluster])
            )
        assert not admin.catalog.ListClusters(cs.ListClustersRequest(run=run.id)).clusters
