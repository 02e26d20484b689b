"""Who may call what: every method of every service, with every kind of token and with none."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import catalog_service_pb2 as cs
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import CbtmError, InvalidArgument, NotFound, PermissionDenied, Unauthenticated
from cbtm_common.ids import hash_secret, new_request_id, new_secret
from cbtm_common.keys import new_key
from cbtm_common.protos import duration
from cbtm_common.rpc import Connection
from cbtm_common.security import split_token
from cbtm_common.wire_errors import error_of
from tests.support.coordinator import RunningCoordinator, running_coordinator
from tests.support.raw_run import RawWorker, make_run, register_request

pytestmark = pytest.mark.integration

_SERVICES = {
    "worker": ws.DESCRIPTOR.services_by_name["WorkerService"],
    "catalog": cs.DESCRIPTOR.services_by_name["CatalogService"],
    "admin": ad.DESCRIPTOR.services_by_name["AdminService"],
}
_METHODS = {
    f"/{service.full_name}/{method.name}": key for key, service in _SERVICES.items() for method in service.methods
}
_JOIN_MAY = {"/cbtm_api.v1.WorkerService/Register", "/cbtm_api.v1.WorkerService/Probe"}
_OF_SERVICE = {key: {m for m, k in _METHODS.items() if k == key} for key in _SERVICES}
# What each kind of caller may call at all; what it may do there is for other tests.
_MAY = {
    "none": set(),
    "wrong": set(),
    "join": _JOIN_MAY,
    "worker": _OF_SERVICE["worker"]
    - {f"/cbtm_api.v1.WorkerService/{name}" for name in ("Register", "IssueCredential")},
    "consumer": _OF_SERVICE["catalog"],
    "admin": _OF_SERVICE["catalog"] | _OF_SERVICE["admin"],
}


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCoordinator]:
    # Many are refused here, from one address.
    limits = {"CBTM_REFUSALS_PER_SECOND": "0"}
    with running_coordinator(tmp_path_factory.mktemp("access"), CBTM_PUBLIC_CATALOG="false", **limits) as running:
        yield running


@pytest.fixture(scope="module")
def worker(coordinator: RunningCoordinator) -> Iterator[RawWorker]:
    with contextlib.closing(RawWorker(coordinator)) as made:
        yield made


def _create_token(admin: Connection, role: pb.TokenRole.ValueType, **fields: object) -> ad.CreateTokenResponse:
    request = ad.CreateTokenRequest(request_id=new_request_id(), role=role, **fields)  # type: ignore[arg-type]
    return admin.admin.CreateToken(request)


@pytest.fixture(scope="module")
def secrets(coordinator: RunningCoordinator, admin: Connection, worker: RawWorker) -> dict[str, str | None]:
    return {
        "none": None,
        "wrong": new_secret("admin"),
        "join": coordinator.token("join"),
        "worker": worker.bearer,
        "consumer": _create_token(admin, pb.TOKEN_ROLE_CONSUMER).secret,
        "admin": coordinator.token("admin"),
    }


def _call(coordinator: RunningCoordinator, method: str, authorization: str | None) -> CbtmError | None:
    """The error of an empty request to `method`, by a channel that knows nothing of our stubs."""
    metadata = (("authorization", authorization),) if authorization is not None else ()
    with coordinator.channel() as channel:
        try:
            channel.unary_unary(method, bytes, bytes)(b"", metadata=metadata, timeout=20)
        except grpc.RpcError as error:
            return error_of(error)
    return None


def test_there_are_methods_to_walk() -> None:
    assert len(_METHODS) >= 36


@pytest.mark.parametrize("who", list(_MAY))
def test_no_method_is_open_to_whom_it_is_not_for(
    coordinator: RunningCoordinator, secrets: dict[str, str | None], who: str
) -> None:
    shown = secrets[who]
    secret = shown and (shown if who == "worker" else split_token(shown)[0])
    refusal = Unauthenticated if who in ("none", "wrong") else PermissionDenied
    for method in _METHODS:
        error = _call(coordinator, method, None if secret is None else f"Bearer {secret}")
        if method in _MAY[who]:
            assert not isinstance(error, Unauthenticated | PermissionDenied), f"{method}: {error}"
        else:
            assert type(error) is refusal, f"{method} said {error!r} to {who}"


def test_health_and_reflection_are_open_to_everybody_and_tell_of_no_run(coordinator: RunningCoordinator) -> None:
    with coordinator.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "cbtm_api.v1.WorkerService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=20)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        listed = reflection.ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=20
        )
        names = {service.name for service in next(listed).list_services_response.service}
    assert {service.full_name for service in _SERVICES.values()} <= names


@pytest.mark.parametrize("authorization", ["", "Bearer", "Bearer ", "Basic abc", "abc", "Bearer  "])
def test_a_header_that_is_no_bearer_secret_is_refused(coordinator: RunningCoordinator, authorization: str) -> None:
    error = _call(coordinator, "/cbtm_api.v1.AdminService/ListWorkers", authorization)
    assert type(error) is Unauthenticated


def test_the_hash_of_a_secret_is_not_the_secret(coordinator: RunningCoordinator) -> None:
    """Who reads the database can call nothing with what stands there."""
    hashed = hash_secret(split_token(coordinator.token("admin"))[0])
    error = _call(coordinator, "/cbtm_api.v1.AdminService/ListWorkers", f"Bearer {hashed}")
    assert type(error) is Unauthenticated


def test_secrets_lie_on_disk_for_their_owner_alone_and_not_in_the_registry(coordinator: RunningCoordinator) -> None:
    for name in ("admin.token", "join.token", "signing.key"):
        mode = stat.S_IMODE(os.stat(coordinator.data_dir / name).st_mode)
        assert mode & 0o077 == 0, f"{name} has mode {mode:o}"
    found = b"".join(path.read_bytes() for path in coordinator.data_dir.glob("registry.db*"))
    for name in ("admin", "join"):
        assert split_token(coordinator.token(name))[0].encode() not in found


def test_a_token_for_one_machine_lets_one_in(coordinator: RunningCoordinator, admin: Connection) -> None:
    made = _create_token(admin, pb.TOKEN_ROLE_WORKER, max_uses=1)
    RawWorker(coordinator, name="first", token=made.secret).close()
    with pytest.raises((PermissionDenied, Unauthenticated)):
        RawWorker(coordinator, name="second", token=made.secret)


def test_a_repeated_registration_is_one_worker(coordinator: RunningCoordinator, admin: Connection) -> None:
    made = _create_token(admin, pb.TOKEN_ROLE_WORKER, max_uses=1)
    request = register_request(new_key(), name="once")
    with coordinator.connect(made.secret) as connection:
        assert connection.worker.Register(request) == connection.worker.Register(request)


def test_an_expired_token_is_good_for_nothing(coordinator: RunningCoordinator, admin: Connection) -> None:
    made = _create_token(admin, pb.TOKEN_ROLE_WORKER, ttl=duration(0.001))
    with pytest.raises(Unauthenticated, match="expired"):
        RawWorker(coordinator, token=made.secret)


def test_a_revoked_token_is_good_for_nothing_and_who_joined_with_it_stays(
    coordinator: RunningCoordinator, admin: Connection
) -> None:
    made = _create_token(admin, pb.TOKEN_ROLE_WORKER)
    with contextlib.closing(RawWorker(coordinator, name="early", token=made.secret)) as early:
        admin.admin.RevokeToken(ad.RevokeTokenRequest(request_id=new_request_id(), token_id=made.token.id))
        with pytest.raises(Unauthenticated, match="revoked"):
            RawWorker(coordinator, name="late", token=made.secret)
        assert early.acquire().idle


def test_a_token_is_listed_without_its_secret(admin: Connection) -> None:
    made = _create_token(admin, pb.TOKEN_ROLE_CONSUMER, label="for the paper")
    listed = admin.admin.ListTokens(ad.ListTokensRequest(page_size=1000)).tokens
    assert next(token for token in listed if token.id == made.token.id).label == "for the paper"
    assert made.secret not in str(listed)


@pytest.mark.parametrize("name", ["", "   ", "x" * 201, "two\nlines", "esc\x1b[31m", "nul\0"])
def test_a_machine_needs_a_name_that_can_be_shown(coordinator: RunningCoordinator, name: str) -> None:
    with pytest.raises(InvalidArgument, match="name"):
        RawWorker(coordinator, name=name)


def test_held_out_shards_are_for_who_judges_and_never_for_who_trains(
    coordinator: RunningCoordinator,
    admin: Connection,
    worker: RawWorker,
    secrets: dict[str, str | None],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    make_run(admin, tmp_path_factory.mktemp("held-out"), name="judged")
    asked = cs.ListShardsRequest(run="judged", split=pb.SPLIT_HELD_OUT)
    held_out = [shard.file.key for shard in admin.catalog.ListShards(asked).shards]
    assert len(held_out) == 2
    wanted = cs.CatalogServicePrepareDownloadRequest(run="judged", keys=held_out)
    with coordinator.connect(secrets["consumer"]) as consumer:
        assert len(consumer.catalog.PrepareDownload(wanted).downloads) == 2
    with pytest.raises(PermissionDenied):
        worker.connection.catalog.ListShards(asked)
    with pytest.raises(PermissionDenied):
        worker.connection.catalog.PrepareDownload(wanted)
    lease = worker.lease()
    for key in held_out:
        with pytest.raises(NotFound):
            worker.calls.PrepareDownload(ws.PrepareDownloadRequest(lease_id=lease.id, epoch=lease.epoch, keys=[key]))


def test_an_open_catalog_shows_models_to_everybody_but_no_shards(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with running_coordinator(tmp_path) as open_one, open_one.connect(open_one.token("admin")) as owner:
        make_run(owner, tmp_path_factory.mktemp("open"), name="open")
        shards = owner.catalog.ListShards(cs.ListShardsRequest(run="open")).shards
        with open_one.connect() as anybody:
            assert [run.name for run in anybody.catalog.ListRuns(cs.ListRunsRequest()).runs] == ["open"]
            (seed,) = anybody.catalog.ListExperts(cs.ListExpertsRequest(run="open")).experts
            keys = [file.key for file in seed.files]
            request = cs.CatalogServicePrepareDownloadRequest(run="open", keys=keys)
            assert len(anybody.catalog.PrepareDownload(request).downloads) == len(keys)
            with pytest.raises(PermissionDenied):
                anybody.catalog.ListShards(cs.ListShardsRequest(run="open"))
            for shard in shards:
                with pytest.raises(NotFound):
                    anybody.catalog.PrepareDownload(
                        cs.CatalogServicePrepareDownloadRequest(run="open", keys=[shard.file.key])
                    )
        # A wrong token is refused even where none is needed: its owner should learn of it.
        with open_one.connect(new_secret("consumer")) as mistaken, pytest.raises(Unauthenticated):
            mistaken.catalog.ListRuns(cs.ListRunsRequest())
