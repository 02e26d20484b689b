"""Attacks on who is who: tokens, keys, credentials, and what another worker holds. Each fails without its defence."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import catalog_service_pb2 as cs
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import (
    CbtmError,
    InvalidArgument,
    LeaseLost,
    NotFound,
    PermissionDenied,
    Unauthenticated,
)
from cbtm_common.files import describe
from cbtm_common.ids import new_request_id, new_secret
from cbtm_common.keys import key_id, new_key, public_key_of, signed_authorization
from cbtm_common.protos import duration
from cbtm_common.rpc import Connection
from cbtm_common.security import join_token, split_token
from cbtm_coordinator.services.credentials import Credentials
from cbtm_coordinator.storage import load_or_create_key
from tests.support.coordinator import RunningCoordinator, running_coordinator
from tests.support.raw_run import RawWorker, checkpoint_folder, make_run, register_request

pytestmark = pytest.mark.integration


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


@pytest.mark.parametrize("hours", [-1, 1])
def test_what_was_signed_for_another_time_is_refused(coordinator: RunningCoordinator, hours: int) -> None:
    with coordinator.connect(coordinator.token("join")) as connection:
        key = new_key()
        worker_id = connection.worker.Register(register_request(key, name=f"late{hours}")).worker.id
        then = datetime.now(UTC) + timedelta(hours=hours)
        # Nobody has used it yet.
        signed = signed_authorization(key, worker_id, int(1e6 * then.timestamp()))
        with pytest.raises(Unauthenticated, match="not of now"):
            _ask_for_credential(connection, key, worker_id, signed)


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
