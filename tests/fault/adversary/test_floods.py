"""Callers that ask for too much: too often, too long, too slowly, and for more than their share."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from cbtm_api.v1 import catalog_service_pb2 as cs
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import RateLimited, ResourceExhausted, Unauthenticated
from cbtm_common.files import describe
from cbtm_common.keys import new_key
from cbtm_common.safetensors_header import MAX_HEADER_BYTES
from cbtm_coordinator.limits import Quotas
from cbtm_coordinator.storage import LocalStore
from cbtm_coordinator.storage.http_app import make_app
from cbtm_coordinator.storage.http_protocol import guarded_protocol
from cbtm_coordinator.storage.signing import UrlSigner
from tests.support.asgi import serve
from tests.support.certificates import OwnAuthority
from tests.support.coordinator import RunningCoordinator, running_coordinator
from tests.support.objects import TTL
from tests.support.raw_run import STEPS, RawWorker, checkpoint_folder, make_run, register_request

pytestmark = pytest.mark.integration

THREADS = 8
LEASES, UPLOADS = 2, 1


@contextlib.contextmanager
def limited_coordinator(folder: Path) -> Iterator[RunningCoordinator]:
    """With small limits, so that a flood is short. A run of many clusters is open."""
    limits = {
        "CBTM_CALLS_PER_SECOND": "5",
        "CBTM_REFUSALS_PER_SECOND": "0.2",
        "CBTM_REGISTRATIONS_PER_SECOND": "0.02",
        "CBTM_LEASES_PER_WORKER": str(LEASES),
        "CBTM_UPLOADS_PER_WORKER": str(UPLOADS),
        "CBTM_THREADS": str(THREADS),
    }
    with running_coordinator(folder, **limits) as running:
        with running.connect(running.token("admin")) as admin:
            make_run(admin, folder, clusters=8)
        yield running


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCoordinator]:
    """For tests that leave the others what they need."""
    with limited_coordinator(tmp_path_factory.mktemp("floods")) as running:
        yield running


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[RunningCoordinator]:
    """For a test that uses up what all callers of its address share."""
    with limited_coordinator(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def worker(coordinator: RunningCoordinator) -> Iterator[RawWorker]:
    with contextlib.closing(RawWorker(coordinator)) as made:
        yield made


def is_served(coordinator: RunningCoordinator) -> bool:
    """Whether somebody else's call is answered in time."""
    with coordinator.connect(coordinator.token("admin"), attempts=1) as admin:
        return bool(admin.catalog.ListRuns(cs.ListRunsRequest(), timeout=5).runs)


def test_calls_that_are_opened_and_send_no_request_hold_up_nobody(coordinator: RunningCoordinator) -> None:
    done = threading.Event()

    def never() -> Iterator[bytes]:
        done.wait(60)
        yield from ()

    with contextlib.ExitStack() as stack:
        stack.callback(done.set)
        for number in range(2):
            channel = stack.enter_context(coordinator.channel([("grpc.use_local_subchannel_pool", 1), ("n", number)]))
            for method in ("WorkerService/RenewLease", "CatalogService/ListRuns"):
                half_open = channel.stream_unary(f"/cbtm_api.v1.{method}")
                for _ in range(2 * THREADS):
                    stack.callback(half_open.future(never(), timeout=60).cancel)
        time.sleep(0.5)  # They have all arrived: what follows must not depend on who is first.
        assert is_served(coordinator)


def test_streams_that_are_left_open_hold_up_nobody(coordinator: RunningCoordinator) -> None:
    done = threading.Event()

    def never() -> Iterator[bytes]:
        done.wait(60)
        yield from ()

    with contextlib.ExitStack() as stack, coordinator.channel() as channel:
        stack.callback(done.set)
        info = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")
        for _ in range(2 * THREADS):
            stack.callback(info(never()).cancel)
            stack.callback(watch(b"").cancel)
        time.sleep(0.5)
        assert is_served(coordinator)


def test_questions_in_one_stream_count_like_calls(alone: RunningCoordinator) -> None:
    with alone.channel() as channel:
        info = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.RpcError, match="too many calls without a token"):
            list(info(itertools.repeat(asked, 5000), timeout=60))
    assert is_served(alone)


def test_a_call_without_a_deadline_is_refused(coordinator: RunningCoordinator) -> None:
    with coordinator.channel() as channel:
        call = channel.unary_unary("/cbtm_api.v1.CatalogService/ListRuns")
        with pytest.raises(grpc.RpcError, match="deadline: ListRuns needs one of at most 900 s"):
            call(b"")
        with pytest.raises(grpc.RpcError, match="deadline: ListRuns needs one"):
            call(b"", timeout=3600)
        assert call(b"", timeout=10)


def test_a_worker_over_its_rate_is_told_how_long_to_wait_and_others_are_served(
    coordinator: RunningCoordinator,
) -> None:
    with contextlib.closing(RawWorker(coordinator, name="flood")) as worker:
        _flood(coordinator, worker)


def _flood(coordinator: RunningCoordinator, worker: RawWorker) -> None:
    lease = worker.lease()
    secret = worker.bearer
    with coordinator.channel() as channel:
        renew = channel.unary_unary("/cbtm_api.v1.WorkerService/RenewLease")
        request = ws.RenewLeaseRequest(lease_id=lease.id, epoch=lease.epoch).SerializeToString()
        metadata = (("authorization", f"Bearer {secret}"),)
        ended: list[Any] = []
        # As many at a time as one connection may have.
        for _ in range(2):
            calls = [renew.future(request, timeout=30, metadata=metadata) for _ in range(60)]
            assert is_served(coordinator)
            ended += [call.exception() for call in calls]
    statuses = [rpc_status.from_call(error) for error in ended if error is not None]
    refused = [status for status in statuses if status is not None and "too many calls" in status.message]
    assert len(refused) > 10, "ten seconds' worth of calls are served at once, and what comes meanwhile"
    hint = RetryInfo()
    assert any(detail.Unpack(hint) for detail in refused[-1].details)
    assert 0 < hint.retry_delay.ToTimedelta().total_seconds() < 20
    worker.renew(lease)  # A client that waits as it was told is served.
    worker.release(lease, ws.RELEASE_REASON_PREEMPTED)


def test_registrations_of_one_address_are_bounded(alone: RunningCoordinator) -> None:
    with (
        contextlib.closing(RawWorker(alone)) as worker,
        alone.connect(alone.token("join"), attempts=1) as connection,
    ):

        def register() -> None:
            connection.worker.Register(register_request(new_key(), name="many", version="0.1.0"))

        with pytest.raises(RateLimited, match="registrations"):  # noqa: PT012 - how many there are before is not told
            for _ in range(20):
                register()
        # Who is registered works on.
        assert worker.calls.Probe(ws.ProbeRequest()).server_version


def test_a_worker_holds_no_more_leases_than_it_may(worker: RawWorker) -> None:
    held = [worker.lease() for _ in range(LEASES)]
    refused = worker.acquire()
    assert not refused.HasField("lease")
    assert f"holds {LEASES} leases" in refused.reason
    assert not refused.idle
    assert refused.retry_after.ToTimedelta().total_seconds() > 0
    worker.release(held.pop(), ws.RELEASE_REASON_PREEMPTED)
    held.append(worker.lease())
    for lease in held:
        worker.release(lease, ws.RELEASE_REASON_PREEMPTED)


def test_a_worker_cannot_fill_the_store_with_what_it_never_commits(worker: RawWorker, tmp_path: Path) -> None:
    lease = worker.lease()
    files = [spec.to_proto() for spec in describe(checkpoint_folder(tmp_path))]
    for spec in files:
        if spec.path.endswith(".safetensors"):
            # As large as a checkpoint of this model may claim to be.
            spec.size += MAX_HEADER_BYTES // 2
    size = sum(spec.size for spec in files)
    steps = iter(range(1, STEPS))

    def fill(held: pb.Lease) -> int:
        """Begins checkpoints until no more are allowed; how many there were."""
        for count, step in enumerate(steps):
            try:
                worker.prepare(held, step, files)
            except ResourceExhausted:
                return count
        return STEPS

    first = worker.prepare(lease, 1, files)
    assert worker.prepare(lease, 1, files).checkpoint.id == first.checkpoint.id, "the same one again adds nothing"
    assert fill(lease) == Quotas(uploads=UPLOADS).upload_bytes(25) // size
    # Nor by giving the task back and beginning anew.
    worker.release(lease, ws.RELEASE_REASON_PREEMPTED)
    again = worker.lease()
    assert fill(again) == 0
    worker.release(again, ws.RELEASE_REASON_PREEMPTED)


def test_who_guesses_credentials_is_stopped_before_the_registry_is_asked(alone: RunningCoordinator) -> None:
    outcomes = []
    for guess in range(8):
        with alone.connect(f"cbtm_worker_guess{guess}", attempts=1) as connection:
            try:
                connection.worker.Probe(ws.ProbeRequest())
            except (Unauthenticated, RateLimited) as error:
                outcomes.append(type(error))
    assert outcomes[0] is Unauthenticated
    assert RateLimited in outcomes
    assert outcomes.count(Unauthenticated) < 6


# The object endpoint


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store", UrlSigner(b"k" * 32))


@contextlib.contextmanager
def guarded(store: LocalStore, *, connections: int = 0, head_seconds: float = 0.5) -> Iterator[int]:
    protocol = guarded_protocol(connections_per_address=connections, head_seconds=head_seconds, closing_seconds=0.5)
    with serve(make_app(store, stall_seconds=0.5), http=protocol) as port:
        yield port


def connected(port: int) -> socket.socket:
    link = socket.create_connection(("127.0.0.1", port))
    link.settimeout(20)
    return link


def ends(link: socket.socket) -> bool:
    """Whether the server ends the connection, with or without a word before."""
    with contextlib.suppress(ConnectionError):
        while link.recv(1 << 16):
            pass
    return True


@pytest.mark.parametrize("said", [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: x\r\nA: b"])
def test_a_head_that_does_not_come_to_its_end_is_not_waited_for(store: LocalStore, said: bytes) -> None:
    with guarded(store) as port, connected(port) as slow, connected(port) as drop_by_drop:
        slow.sendall(said)
        assert ends(slow)
        # Nor does a byte now and then prolong it.
        drop_by_drop.sendall(b"GET / HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                drop_by_drop.sendall(b"A: b\r\n")
                time.sleep(0.05)
            pytest.fail("it was waited for")
        with connected(port) as other:
            other.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert other.recv(4096).startswith(b"HTTP/1.1 200")


def test_a_tls_handshake_that_does_not_come_to_its_end_is_not_waited_for(store: LocalStore, tmp_path: Path) -> None:
    certificate, key = OwnAuthority(tmp_path, "own").server()
    tls = {"ssl_certfile": certificate, "ssl_keyfile": key}
    with serve(make_app(store), handshake_seconds=0.5, http=guarded_protocol(connections_per_address=0), **tls) as port:
        started = time.monotonic()
        with connected(port) as silent, connected(port) as drop_by_drop:
            # What begins a handshake, and would go on with 512 bytes.
            drop_by_drop.sendall(b"\x16\x03\x01\x02\x00")
            with contextlib.suppress(ConnectionError):
                while time.monotonic() - started < 20:
                    drop_by_drop.sendall(b"\x00")
                    time.sleep(0.05)
                pytest.fail("it was waited for")
            assert ends(silent)
        # Who shakes hands in time stays.
        with httpx.Client(verify=ssl.create_default_context(cafile=tmp_path / "own" / "ca.pem")) as client:
            for _ in range(2):
                assert client.get(f"https://127.0.0.1:{port}/healthz").status_code == 200
                time.sleep(0.6)
            assert client.get(f"https://127.0.0.1:{port}/healthz").status_code == 200


def test_a_head_without_end_is_not_kept(store: LocalStore) -> None:
    # Its size alone ends it: there is time for it.
    with guarded(store, head_seconds=300) as port, connected(port) as link:
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                link.sendall(b"GET / HTTP/1.1\r\n" if _ == 0 else b"A: " + b"b" * 10_000 + b"\r\n")
        assert ends(link)


def test_a_reader_that_never_reads_holds_no_connection(store: LocalStore) -> None:
    store.put_bytes("runs/large", b"x" * (64 << 20))
    url = store.sign_get("runs/large", ttl=TTL).url
    with guarded(store, connections=1) as port:
        link = socket.socket()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.settimeout(20)
        with link:
            link.connect(("127.0.0.1", port))
            link.sendall(f"GET {url} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            # Nothing is read. The only place of this address comes free all the same.
            answered = b""
            deadline = time.monotonic() + 20
            while not answered and time.monotonic() < deadline:
                with contextlib.suppress(ConnectionError), connected(port) as other:
                    other.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                    answered = other.recv(4096)
                time.sleep(0.05)
    assert answered.startswith(b"HTTP/1.1 200")


def test_connections_of_one_address_are_bounded(store: LocalStore) -> None:
    def answers(link: socket.socket) -> bool:
        """Whether this connection is still served. All of the answer is read, whose parts come when they come."""
        asked = http.client.HTTPConnection("127.0.0.1")
        asked.sock = link
        asked.request("GET", "/healthz")
        answer = asked.getresponse()
        return answer.status == 200 and bool(answer.read())

    with guarded(store, connections=2) as port, connected(port) as first, connected(port) as second:
        for link in (first, second):
            assert answers(link)
        with connected(port) as third, pytest.raises(ConnectionError):
            answers(third)
        assert answers(first)
