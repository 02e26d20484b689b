"""Attacks on who is who: tokens, keys, credentials, leases, and the channel itself. Each fails without its defence."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import catalog_service_pb2 as cs
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import (
    CbtmError,
    IntegrityError,
    InvalidArgument,
    LeaseLost,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from cbtm_common.files import describe
from cbtm_common.ids import new_request_id, new_secret
from cbtm_common.keys import key_id, new_key, public_key_of, signed_authorization
from cbtm_common.protos import duration
from cbtm_common.rpc import Connection, Credential, RetryPolicy, connect
from cbtm_common.security import Security, join_token, split_token
from cbtm_coordinator.config import CoordinatorConfig
from cbtm_coordinator.services.credentials import Credentials
from cbtm_coordinator.storage import load_or_create_key
from cbtm_coordinator.tls import Authority, Certificates
from tests.support.coordinator import RunningCoordinator, running_coordinator
from tests.support.raw_run import RawWorker, checkpoint_folder, make_run, register_request

pytestmark = pytest.mark.integration
_REFUSED = (Unauthenticated, PermissionDenied)


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCoordinator]:
    with running_coordinator(tmp_path_factory.mktemp("identity"), CBTM_PUBLIC_CATALOG="false") as running:
        yield running


@pytest.fixture(scope="module")
def admin(coordinator: RunningCoordinator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    with coordinator.connect(coordinator.token("admin")) as connection:
        make_run(connection, tmp_path_factory.mktemp("run"), clusters=4)
        yield connection


def _token(admin: Connection, **fields: Any) -> ad.CreateTokenResponse:
    fields = {"role": pb.TOKEN_ROLE_WORKER, **fields}
    return admin.admin.CreateToken(ad.CreateTokenRequest(request_id=new_request_id(), **fields))


def _join(coordinator: RunningCoordinator, token: str) -> None:
    RawWorker(coordinator, token=token).close()


@contextlib.contextmanager
def _as(coordinator: RunningCoordinator, bearer: str) -> Iterator[Connection]:
    """A connection that shows `bearer`, whatever it is."""
    with coordinator.connect() as connection:
        connection.credential = bearer
        yield connection


@pytest.fixture
def worker(coordinator: RunningCoordinator, admin: Connection) -> Iterator[RawWorker]:
    with contextlib.closing(RawWorker(coordinator, name="honest")) as made:
        yield made


@pytest.fixture
def thief(coordinator: RunningCoordinator, admin: Connection) -> Iterator[RawWorker]:
    with contextlib.closing(RawWorker(coordinator, name="thief")) as made:
        yield made


# Tokens


def test_made_up_tokens_let_nobody_in_and_are_not_repeated_in_what_is_said(coordinator: RunningCoordinator) -> None:
    secret, fingerprint = split_token(coordinator.token("join"))
    for wrong in (new_secret("worker"), secret[:-1], secret + "x", secret.upper()):
        with pytest.raises(Unauthenticated) as caught:
            _join(coordinator, join_token(wrong, fingerprint))
        assert wrong not in caught.value.message
        assert wrong not in coordinator.log


@pytest.mark.parametrize(
    ("fields", "spoil"),
    [
        pytest.param({"ttl": duration(0.001)}, lambda admin, coordinator, made: None, id="expired"),
        pytest.param({"max_uses": 1}, lambda admin, coordinator, made: _join(coordinator, made.secret), id="used up"),
        pytest.param(
            {},
            lambda admin, coordinator, made: admin.admin.RevokeToken(
                ad.RevokeTokenRequest(request_id=new_request_id(), token_id=made.token.id)
            ),
            id="revoked",
        ),
    ],
)
def test_a_token_past_its_right_lets_nobody_in(
    coordinator: RunningCoordinator,
    admin: Connection,
    fields: dict[str, Any],
    spoil: Callable[[Connection, RunningCoordinator, ad.CreateTokenResponse], Any],
) -> None:
    made = _token(admin, **fields)
    spoil(admin, coordinator, made)
    with pytest.raises(Unauthenticated):
        _join(coordinator, made.secret)


def test_a_token_for_one_machine_that_is_used_by_many_at_once_lets_one_in(
    coordinator: RunningCoordinator, admin: Connection
) -> None:
    made = _token(admin, max_uses=1)

    def join(_: int) -> type[Exception] | None:
        try:
            _join(coordinator, made.secret)
        except CbtmError as error:
            return type(error)
        return None

    with ThreadPoolExecutor(6) as pool:
        assert sorted(map(str, pool.map(join, range(6)))) == sorted(map(str, [None] + 5 * [Unauthenticated]))


def test_one_role_s_token_does_nothing_of_another_s(coordinator: RunningCoordinator, admin: Connection) -> None:
    lease = ws.AcquireLeaseRequest(request_id=new_request_id())
    consumer = split_token(_token(admin, role=pb.TOKEN_ROLE_CONSUMER).secret)[0]
    owner, join = (split_token(coordinator.token(name))[0] for name in ("admin", "join"))
    for bearer in (consumer, owner, join):
        with _as(coordinator, bearer) as connection, pytest.raises(PermissionDenied):
            connection.worker.AcquireLease(lease)
    for bearer in (consumer, join):
        with _as(coordinator, bearer) as connection, pytest.raises(PermissionDenied):
            connection.admin.ListWorkers(ad.ListWorkersRequest())
    with _as(coordinator, join) as connection, pytest.raises(PermissionDenied):
        connection.catalog.ListRuns(cs.ListRunsRequest())


# Keys


def test_a_key_that_is_not_held_cannot_be_registered(coordinator: RunningCoordinator, worker: RawWorker) -> None:
    """Nor can a registration that was overheard be used for another one."""
    with coordinator.connect(coordinator.token("join")) as connection:
        victim = public_key_of(new_key())
        stolen = register_request(new_key(), name="thief")
        stolen.public_key = victim
        with pytest.raises(InvalidArgument, match="proof"):
            connection.worker.Register(stolen)
        overheard = register_request(worker.key, name="thief")
        overheard.request_id = new_request_id()
        with pytest.raises(InvalidArgument, match="proof"):
            connection.worker.Register(overheard)
        for missing in (b"", bytes(31)):
            request = register_request(new_key(), name="thief")
            request.public_key = missing
            with pytest.raises(InvalidArgument, match="proof"):
                connection.worker.Register(request)


def test_who_repeats_another_s_registration_with_a_key_of_its_own_becomes_nobody(
    coordinator: RunningCoordinator,
) -> None:
    with coordinator.connect(coordinator.token("join")) as connection:
        request = register_request(new_key(), name="honest")
        registered = connection.worker.Register(request).worker
        key = new_key()
        repeated = connection.worker.Register(register_request(key, request_id=request.request_id, name="thief"))
        assert repeated.worker.id == registered.id
        with pytest.raises(Unauthenticated):
            _ask_for_credential(connection, key, registered.id)


def _ask_for_credential(connection: Connection, key: bytes, worker_id: str, authorization: str = "") -> str:
    signed = authorization or signed_authorization(key, worker_id, int(1e6 * datetime.now(UTC).timestamp()))
    metadata = (("authorization", signed),)
    return connection.worker.IssueCredential(ws.IssueCredentialRequest(), metadata=metadata).credential


def test_what_a_worker_signed_is_good_once(coordinator: RunningCoordinator) -> None:
    with coordinator.connect(coordinator.token("join")) as connection:
        key = new_key()
        worker_id = connection.worker.Register(register_request(key, name="overheard")).worker.id
        signed = signed_authorization(key, worker_id, int(1e6 * datetime.now(UTC).timestamp()))
        assert _ask_for_credential(connection, key, worker_id, signed)
        with pytest.raises(Unauthenticated, match="later"):
            _ask_for_credential(connection, key, worker_id, signed)
        # For another worker, or another time, it is no signature at all.
        _, _, tail = signed.partition(".")
        for forged in (f"Signature worker_other.{tail}", signed.replace(".17", ".18", 1)):
            with pytest.raises(Unauthenticated):
                _ask_for_credential(connection, key, worker_id, forged)


def test_a_machine_whose_clock_is_wrong_is_told_and_signs_again(
    coordinator: RunningCoordinator, worker: RawWorker
) -> None:
    from cbtm_worker.credential import WorkerCredential
    from cbtm_worker.identity import Identity
    from cbtm_worker.session import Session

    identity = Identity(worker_id=worker.id, private_key=worker.key.hex())
    issue = Session(worker.connection)._issue
    for hours in (-1000, 1000):
        wrong = WorkerCredential(identity, issue, clock=lambda hours=hours: datetime.now().timestamp() + 3600 * hours)  # type: ignore[misc]
        assert wrong.bearer().startswith("cbtm_session_")


# Credentials


def _stolen(coordinator: RunningCoordinator, worker: RawWorker, *, age: timedelta) -> str:
    """What was given to this worker so long ago."""
    key = load_or_create_key(coordinator.data_dir / "signing.key")
    old = Credentials(key, clock=lambda: datetime.now(UTC) - age)
    return old.issue(worker.id, key_id(public_key_of(worker.key)))


def test_a_stolen_credential_ends_with_its_time(coordinator: RunningCoordinator, worker: RawWorker) -> None:
    request = ws.ProbeRequest()
    with _as(coordinator, _stolen(coordinator, worker, age=timedelta(minutes=1))) as connection:
        assert connection.worker.Probe(request).server_version
    late = _stolen(coordinator, worker, age=timedelta(minutes=16))
    with _as(coordinator, late) as connection, pytest.raises(Unauthenticated, match="expired"):
        connection.worker.Probe(request)


def test_a_credential_that_was_changed_or_made_elsewhere_is_refused(
    coordinator: RunningCoordinator, worker: RawWorker, thief: RawWorker
) -> None:
    good = thief.bearer
    elsewhere = Credentials(bytes(32), clock=lambda: datetime.now(UTC)).issue(worker.id, "0" * 32)
    later = good.rsplit(".", 2)
    forgeries = [elsewhere, good.replace(thief.id, worker.id), f"{later[0]}.{int(later[1]) + 10_000}.{later[2]}"]
    for forged in forgeries:
        assert forged != good
        with _as(coordinator, forged) as connection, pytest.raises(Unauthenticated):
            connection.worker.Probe(ws.ProbeRequest())


def test_after_a_recovery_the_stolen_key_and_all_that_it_got_are_good_for_nothing(
    coordinator: RunningCoordinator, admin: Connection, thief: RawWorker
) -> None:
    """The machine of `thief` was copied; its owner asks for a recovery."""
    stolen_bearer, stolen_lease = thief.bearer, thief.lease()
    made = admin.admin.RecoverWorker(ad.RecoverWorkerRequest(request_id=new_request_id(), worker_id=thief.id))
    with contextlib.closing(RawWorker(coordinator, name="again", token=made.secret)) as recovered:
        assert recovered.id == thief.id
        # A token for a recovery is good once.
        with pytest.raises(Unauthenticated):
            _join(coordinator, made.secret)
        with pytest.raises(LeaseLost):
            thief.renew(stolen_lease)
        with pytest.raises(Unauthenticated):
            thief.acquire()
        with _as(coordinator, stolen_bearer) as connection, pytest.raises(Unauthenticated):
            connection.worker.AcquireLease(ws.AcquireLeaseRequest(request_id=new_request_id()))
        with coordinator.connect() as connection, pytest.raises(Unauthenticated):
            _ask_for_credential(connection, thief.key, thief.id)
        recovered.renew(recovered.lease())


def test_a_revoked_worker_gets_neither_work_nor_credentials_nor_a_new_key(
    coordinator: RunningCoordinator, admin: Connection, thief: RawWorker
) -> None:
    lease = thief.lease()
    admin.admin.RevokeWorker(ad.RevokeWorkerRequest(request_id=new_request_id(), worker_id=thief.id, reason="caught"))
    with pytest.raises(LeaseLost):
        thief.renew(lease)
    with pytest.raises(PermissionDenied, match="caught"):
        thief.acquire()
    with coordinator.connect() as connection, pytest.raises(PermissionDenied, match="caught"):
        _ask_for_credential(connection, thief.key, thief.id)
    with pytest.raises(CbtmError, match="caught"):
        admin.admin.RecoverWorker(ad.RecoverWorkerRequest(request_id=new_request_id(), worker_id=thief.id))


# What another worker holds


def _leased_methods() -> dict[str, Any]:
    service = ws.DESCRIPTOR.services_by_name["WorkerService"]
    return {m.name: m.input_type._concrete_class for m in service.methods if "lease_id" in m.input_type.fields_by_name}


def test_nothing_can_be_done_on_another_worker_s_lease_or_with_another_epoch(
    worker: RawWorker, thief: RawWorker, tmp_path: Path
) -> None:
    lease = worker.lease()
    folder = checkpoint_folder(tmp_path / "checkpoint")
    prepared = worker.upload(lease, 3, folder)
    fields: dict[str, dict[str, Any]] = {
        "PrepareUpload": {"step": 4, "files": [spec.to_proto() for spec in describe(folder)]},
        "CommitCheckpoint": {"checkpoint_id": prepared.checkpoint.id},
        "ReleaseLease": {"release_reason": ws.RELEASE_REASON_FAILED},
    }
    methods = _leased_methods()
    assert len(methods) >= 6
    for name, kind in methods.items():
        for caller, epoch in ((thief, lease.epoch), (worker, lease.epoch + 1), (worker, lease.epoch - 1)):
            request = kind(lease_id=lease.id, epoch=epoch, **fields.get(name, {}))
            if "request_id" in kind.DESCRIPTOR.fields_by_name:
                request.request_id = new_request_id()
            with pytest.raises((LeaseLost, PermissionDenied, NotFound)):
                getattr(caller.calls, name)(request)
    assert worker.commit(lease, prepared.checkpoint.id).checkpoint.state == pb.CHECKPOINT_STATE_COMMITTED


def test_an_upload_url_is_for_its_own_key_length_bytes_and_method(
    worker: RawWorker, thief: RawWorker, tmp_path: Path
) -> None:
    folder = checkpoint_folder(tmp_path / "mine")
    files = [spec.to_proto() for spec in describe(folder)]
    mine = {u.file.path: u for u in thief.prepare(thief.lease(), 3, files).uploads}["state.json"]
    theirs = {u.file.path: u for u in worker.prepare(worker.lease(), 3, files).uploads}["state.json"]
    data = (folder / "state.json").read_bytes()
    base = worker.connection.http_base
    path, _, query = mine.request.url.partition("?")
    with httpx.Client(base_url=base, verify=worker.connection.http_context()) as client:
        assert client.put(theirs.request.url.partition("?")[0] + "?" + query, content=data).status_code == 403
        assert client.get(mine.request.url).status_code == 403
        assert client.put(f"{path}?{query.replace('size=', 'size=1')}", content=data).status_code == 403
        assert client.put(mine.request.url, content=data + b" ").status_code == 413
        assert client.put(mine.request.url, content=bytes(len(data))).status_code == 400
        assert client.put(path, content=data).status_code == 401
        assert client.put(mine.request.url, content=data).status_code == 200


# The channel


class Impostor:
    """A coordinator's port with another's certificates, that notes what is asked of it."""

    def __init__(self, data_dir: Path, *, port: int = 0) -> None:
        self.asked: list[str] = []
        data_dir.mkdir(exist_ok=True)
        self.certificates = Certificates(CoordinatorConfig(data_dir=data_dir))
        self._server = grpc.server(ThreadPoolExecutor(2), handlers=[_Noting(self.asked)])
        self.port = self._server.add_secure_port(f"127.0.0.1:{port}", self.certificates.grpc_credentials())

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Impostor:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait()


class _Noting(grpc.GenericRpcHandler):  # type: ignore[misc]  # untyped in the stubs
    def __init__(self, asked: list[str]) -> None:
        self._asked = asked

    def service(self, details: Any) -> Any:
        self._asked.append(details.method)
        return None


def _ask(connection: Connection) -> None:
    connection.worker.Probe(ws.ProbeRequest())


def test_another_certificate_under_the_coordinator_s_name_is_told_nothing(
    coordinator: RunningCoordinator, tmp_path: Path
) -> None:
    token = coordinator.token("join")
    with Impostor(tmp_path / "impostor") as impostor, connect(impostor.target, token=token, attempts=1) as connection:
        with pytest.raises(IntegrityError, match="ask the run's owner for a new token"):
            _ask(connection)
        with pytest.raises(IntegrityError):
            connection.http_context()
        assert not impostor.asked


def test_who_shows_the_true_authority_without_being_certified_by_it_is_told_nothing(
    coordinator: RunningCoordinator, tmp_path: Path
) -> None:
    """The authority's certificate is public: anybody may append it to a chain of his own."""
    with Impostor(tmp_path / "impostor") as prepared:
        served = prepared.certificates.current()
    server_pem = tmp_path / "impostor" / "tls" / "server.pem"
    server_pem.write_bytes(served.chain + (coordinator.data_dir / "tls" / "ca.pem").read_bytes())
    with (
        Impostor(tmp_path / "impostor") as impostor,
        connect(impostor.target, token=coordinator.token("join"), attempts=1) as connection,
    ):
        with pytest.raises(IntegrityError, match="not trusted"):
            _ask(connection)
        assert not impostor.asked


def test_an_impostor_that_comes_between_later_is_told_nothing(tmp_path: Path) -> None:
    """It takes the address over while the client holds an open connection object."""
    shutil.rmtree(tmp_path / "true", ignore_errors=True)
    with Impostor(tmp_path / "true") as true:
        port = true.port
        token = join_token(new_secret("worker"), true.certificates.fingerprint)
        connection = connect(true.target, token=token, attempts=1)
        with pytest.raises(CbtmError):
            _ask(connection)
        assert true.asked
    with connection, Impostor(tmp_path / "impostor", port=port) as impostor:
        with pytest.raises(Unavailable):
            _ask(connection)
        assert not impostor.asked


def test_objects_are_neither_sent_nor_fetched_past_another_certificate(
    coordinator: RunningCoordinator, worker: RawWorker, tmp_path: Path
) -> None:
    (tmp_path / "impostor").mkdir()
    context = Certificates(CoordinatorConfig(data_dir=tmp_path / "impostor")).http_context()
    got: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                link, _ = listener.accept()
                with link, context.wrap_socket(link, server_side=True) as wrapped:
                    got.append(wrapped.recv(1000))

        server = threading.Thread(target=serve)
        server.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/v1/objects/x"
        with pytest.raises(httpx.ConnectError), httpx.Client(verify=worker.connection.http_context()) as client:
            client.get(url)
        server.join(20)
    assert not got


def test_plain_text_is_for_loopback_or_said_twice_on_both_sides(coordinator: RunningCoordinator) -> None:
    for host in ("192.0.2.7", "example.org", "0.0.0.0"):
        with pytest.raises(InvalidArgument, match="plain text"):
            connect(f"{host}:50051", security=Security(insecure=1))
        connect(f"{host}:50051", security=Security(insecure=2)).close()
    served = coordinator.coord("serve", "--host", "0.0.0.0", "--port", "0", "--http-port", "0", "--insecure")
    assert served.returncode == 2
    assert "plain text" in served.stderr
    # Nor does one that is served with TLS take plain text.
    with connect(coordinator.target, security=Security(insecure=1), attempts=1) as plain, pytest.raises(Unavailable):
        _ask(plain)


def test_a_token_whose_fingerprint_was_cut_is_refused_before_anything_is_sent(coordinator: RunningCoordinator) -> None:
    for cut in (coordinator.token("join")[:-1], coordinator.token("join")[:-43]):
        with pytest.raises(InvalidArgument, match="cut short") as caught:
            connect(coordinator.target, token=cut)
        assert cut not in caught.value.message


def test_a_token_without_its_fingerprint_is_refused_at_once(
    coordinator: RunningCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not tried again: nothing that passes with time is wrong."""
    waits: list[int] = []
    monkeypatch.setattr(RetryPolicy, "delay", lambda self, attempt, chance: waits.append(attempt) or 0.0)
    secret = split_token(coordinator.token("join"))[0]
    with (
        connect(coordinator.target, token=secret) as connection,
        pytest.raises(IntegrityError, match=r"not trusted.*fingerprint \(as it was handed out"),
    ):
        _ask(connection)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_answer_in_plain_text, args=(listener, 2), daemon=True).start()
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        for token in (secret, coordinator.token("join")):
            with connect(target, token=token) as connection, pytest.raises(InvalidArgument, match="not answer in TLS"):
                _ask(connection)
    assert waits == []


def _answer_in_plain_text(listener: socket.socket, count: int) -> None:
    for _ in range(count):
        link, _ = listener.accept()
        with link, contextlib.suppress(ConnectionError):
            link.recv(1000)
            link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            while link.recv(1000):
                pass


def test_the_certificate_is_renewed_under_the_same_authority_before_it_ends(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    config = CoordinatorConfig(data_dir=tmp_path)
    certificates = Certificates(config, clock=lambda: now)
    first = certificates.current()
    now += timedelta(days=59)
    assert certificates.current() is first
    now += timedelta(days=2)
    second = certificates.current()
    assert second.not_after > first.not_after
    # A process beside it, and the next one, serve the same.
    assert Authority(config, clock=lambda: now).server_certificate().chain == second.chain
    assert Certificates(config, clock=lambda: now).fingerprint == certificates.fingerprint


# What leaks


def test_ps_does_not_show_a_token(coordinator: RunningCoordinator, tmp_path: Path) -> None:
    token = coordinator.token("join")
    program = "import sys; from cbtm_worker.cli import main; main()"
    join = ["join", "--coordinator", coordinator.target, "--device", "cpu", "--cache-dir", str(tmp_path)]
    for shown in (["--token", token], [f"--token={token}"]):
        process = subprocess.Popen(
            [sys.executable, "-c", program, *join, *shown], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert "joined" in said
            line = Path(f"/proc/{process.pid}/cmdline").read_bytes().decode()
            assert "--coordinator" in line
            assert split_token(token)[0] not in line
        finally:
            process.kill()
            process.communicate()


def test_a_token_may_come_from_a_file_or_standard_input(coordinator: RunningCoordinator, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(coordinator.token("admin") + "\n")
    listed = coordinator.coord(
        "token", "list", "--coordinator", coordinator.target, "--token-file", str(path), "--json"
    )
    assert listed.returncode == 0, listed.stderr
    path.write_text("two words")
    refused = coordinator.coord("token", "list", "--token-file", str(path))
    assert refused.returncode == 2
    assert "words" not in refused.stderr


def test_no_secret_lies_in_the_registry_or_the_log(coordinator: RunningCoordinator, worker: RawWorker) -> None:
    bearer = worker.bearer
    with pytest.raises(_REFUSED), _as(coordinator, bearer) as connection:
        connection.admin.ListWorkers(ad.ListWorkersRequest())
    stored = b"".join(path.read_bytes() for path in coordinator.data_dir.glob("registry.db*"))
    secrets = [split_token(coordinator.token(name))[0] for name in ("admin", "join")]
    for secret in (*secrets, bearer, worker.key.hex()):
        assert secret.encode() not in stored
        assert secret not in coordinator.log
    assert isinstance(worker.connection.credential, Credential)
