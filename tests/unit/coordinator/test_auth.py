"""The table of who may call what is complete, and nobody gets in beside it."""

from __future__ import annotations

from datetime import timedelta

import pytest

from cbtm_api.v1 import admin_service_pb2, catalog_service_pb2, worker_service_pb2
from cbtm_common.errors import PermissionDenied, Unauthenticated
from cbtm_common.ids import hash_secret, new_id, new_secret
from cbtm_coordinator.services.auth import Authenticator, Principal, Role, allowed_roles, check_active
from cbtm_coordinator.store import identities
from tests.support.registry import Registry

_METHODS = [
    f"/{service.full_name}/{method.name}"
    for module in (worker_service_pb2, catalog_service_pb2, admin_service_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
_LIST_RUNS = "/cbtm_api.v1.CatalogService/ListRuns"
_CREATE_RUN = "/cbtm_api.v1.AdminService/CreateRun"
_ACQUIRE = "/cbtm_api.v1.WorkerService/AcquireLease"
_REGISTER = "/cbtm_api.v1.WorkerService/Register"


def _token(registry: Registry, role: str, *, expires_in: float | None = None) -> tuple[str, str]:
    """(id, secret) of a new token."""
    token_id, secret = new_id("token"), new_secret(role.lower())
    with registry.store.writing() as tx:
        now = registry.clock()
        identities.create_token(
            tx,
            now,
            token_id=token_id,
            role=role,
            secret_hash=hash_secret(secret),
            label="",
            expire_time=None if expires_in is None else now + timedelta(seconds=expires_in),
            max_uses=0,
        )
    return token_id, secret


def _authenticator(registry: Registry, *, public: bool = False) -> Authenticator:
    return Authenticator(registry.store, public_catalog=public)


@pytest.mark.parametrize("method", _METHODS)
def test_every_method_of_ours_is_for_somebody_and_never_for_everybody(method: str) -> None:
    roles = allowed_roles(method)
    assert roles
    assert Role.ANONYMOUS not in roles


@pytest.mark.parametrize(
    "method", ["", "/", "/cbtm_api.v1.AdminService/", "/cbtm_api.v1.AdminService/Nonsense", "/other.Service/CreateRun"]
)
def test_a_method_that_is_not_in_the_table_is_for_nobody(registry: Registry, method: str) -> None:
    assert not allowed_roles(method)
    _, secret = _token(registry, "ADMIN")
    with pytest.raises(PermissionDenied, match="nobody"):
        _authenticator(registry).check(method, f"Bearer {secret}")


def test_a_good_token_is_its_principal(registry: Registry) -> None:
    token_id, secret = _token(registry, "ADMIN")
    for authorization in (f"Bearer {secret}", f"bearer  {secret} "):
        principal = _authenticator(registry).check(_CREATE_RUN, authorization)
        assert principal == Principal(role=Role.ADMIN, id=token_id)


@pytest.mark.parametrize("role", ["WORKER", "CONSUMER"])
def test_a_token_of_a_lower_role_makes_no_run(registry: Registry, role: str) -> None:
    _, secret = _token(registry, role)
    with pytest.raises(PermissionDenied, match=f"this token is {role}"):
        _authenticator(registry).check(_CREATE_RUN, f"Bearer {secret}")


def test_a_join_token_registers_and_takes_no_work(registry: Registry) -> None:
    _, secret = _token(registry, "WORKER")
    assert _authenticator(registry).check(_REGISTER, f"Bearer {secret}").role is Role.JOIN
    with pytest.raises(PermissionDenied):
        _authenticator(registry).check(_ACQUIRE, f"Bearer {secret}")


def test_a_token_ends_at_its_time(registry: Registry) -> None:
    _, secret = _token(registry, "ADMIN", expires_in=60)
    check = _authenticator(registry)
    registry.clock.advance(59)
    assert check.check(_CREATE_RUN, f"Bearer {secret}").role is Role.ADMIN
    registry.clock.advance(1)
    with pytest.raises(Unauthenticated, match="expired"):
        check.check(_CREATE_RUN, f"Bearer {secret}")


def test_without_a_token_the_catalog_is_open_only_where_the_owner_says_so(registry: Registry) -> None:
    assert _authenticator(registry, public=True).check(_LIST_RUNS, "").role is Role.ANONYMOUS
    with pytest.raises(Unauthenticated, match="CBTM_TOKEN"):
        _authenticator(registry).check(_LIST_RUNS, "")


def test_an_open_catalog_opens_nothing_else(registry: Registry) -> None:
    check = _authenticator(registry, public=True)
    for method in _METHODS:
        if "CatalogService" not in method:
            with pytest.raises(Unauthenticated):
                check.check(method, "")


@pytest.mark.parametrize("authorization", ["Bearer", "Bearer ", "Basic YTpi", "token", " Bearer x"])
def test_what_is_no_bearer_secret_is_refused_also_by_an_open_catalog(registry: Registry, authorization: str) -> None:
    with pytest.raises(Unauthenticated):
        _authenticator(registry, public=True).check(_LIST_RUNS, authorization)


def test_a_worker_is_looked_up_once_and_its_revocation_holds_where_it_asks_for_work(registry: Registry) -> None:
    worker, check = registry.worker(), _authenticator(registry)
    # The registry of tests hashes a worker's id for its secret.
    assert check.check(_ACQUIRE, f"Bearer {worker}") == Principal(role=Role.WORKER, id=worker)
    with registry.store.writing() as tx:
        identities.set_revoked(tx, registry.clock(), worker, "sends rubbish")
    assert check.check(_ACQUIRE, f"Bearer {worker}").id == worker
    with registry.store.writing() as tx, pytest.raises(PermissionDenied, match="sends rubbish"):
        check_active(identities.seen(tx, registry.clock(), worker))
    with pytest.raises(PermissionDenied, match="sends rubbish"):
        _authenticator(registry).check(_ACQUIRE, f"Bearer {worker}")


def test_a_worker_is_looked_up_again_after_a_while(registry: Registry) -> None:
    worker = registry.worker()
    check = Authenticator(registry.store, public_catalog=False, remember_seconds=0)
    check.check(_ACQUIRE, f"Bearer {worker}")
    with registry.store.writing() as tx:
        identities.set_revoked(tx, registry.clock(), worker, "sends rubbish")
    with pytest.raises(PermissionDenied, match="sends rubbish"):
        check.check(_ACQUIRE, f"Bearer {worker}")
