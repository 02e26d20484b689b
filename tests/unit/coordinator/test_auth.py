"""The table of who may call what is complete, and nobody gets in beside it."""

from __future__ import annotations

from datetime import timedelta

import pytest

from cbtm_api.v1 import admin_service_pb2, catalog_service_pb2, worker_service_pb2
from cbtm_common.errors import PermissionDenied, Unauthenticated
from cbtm_common.ids import hash_secret, new_id, new_secret
from cbtm_common.keys import key_id, new_key, public_key_of, signed_authorization
from cbtm_coordinator.services.auth import Authenticator, Principal, Role, allowed_roles, check_current
from cbtm_coordinator.services.credentials import Credentials
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
_ISSUE = "/cbtm_api.v1.WorkerService/IssueCredential"
LIFE = timedelta(minutes=15)
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
    return Authenticator(registry.store, _credentials(registry), public_catalog=public)


def _credentials(registry: Registry) -> Credentials:
    return Credentials(bytes(32), clock=registry.clock, life=LIFE)


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


def _worker(registry: Registry) -> tuple[str, bytes]:
    """(id, private key) of a new worker."""
    worker_id, key = registry.worker(), new_key()
    with registry.store.writing() as tx:
        identities.replace_key(tx, registry.clock(), worker_id, public_key_of(key).hex())
    return worker_id, key


def _signed(registry: Registry, worker_id: str, key: bytes, *, seconds: float = 0.0) -> str:
    return signed_authorization(key, worker_id, int(1e6 * (registry.clock().timestamp() + seconds)))


def _bearer(registry: Registry, worker_id: str, key: bytes) -> str:
    return f"Bearer {_credentials(registry).issue(worker_id, key_id(public_key_of(key)))}"


def test_a_worker_is_looked_up_once_and_its_revocation_holds_where_it_asks_for_work(registry: Registry) -> None:
    (worker, key), check = _worker(registry), _authenticator(registry)
    bearer = _bearer(registry, worker, key)
    principal = check.check(_ACQUIRE, bearer)
    assert (principal.role, principal.id) == (Role.WORKER, worker)
    with registry.store.writing() as tx:
        identities.set_revoked(tx, registry.clock(), worker, "sends rubbish")
    assert check.check(_ACQUIRE, bearer) == principal
    with registry.store.writing() as tx, pytest.raises(PermissionDenied, match="sends rubbish"):
        check_current(identities.seen(tx, registry.clock(), worker), principal)
    with pytest.raises(PermissionDenied, match="sends rubbish"):
        _authenticator(registry).check(_ACQUIRE, bearer)


def test_a_worker_is_looked_up_again_after_a_while(registry: Registry) -> None:
    worker, key = _worker(registry)
    check = Authenticator(registry.store, _credentials(registry), public_catalog=False, remember_seconds=0)
    bearer = _bearer(registry, worker, key)
    check.check(_ACQUIRE, bearer)
    with registry.store.writing() as tx:
        identities.set_revoked(tx, registry.clock(), worker, "sends rubbish")
    with pytest.raises(PermissionDenied, match="sends rubbish"):
        check.check(_ACQUIRE, bearer)


def test_a_signature_fetches_a_credential_once_and_nothing_else(registry: Registry) -> None:
    (worker, key), check = _worker(registry), _authenticator(registry)
    signed = _signed(registry, worker, key)
    with pytest.raises(Unauthenticated):
        check.check(_ACQUIRE, signed)
    assert check.check(_ISSUE, signed).role is Role.KEY
    with pytest.raises(Unauthenticated, match="not later"):
        check.check(_ISSUE, signed)
    with pytest.raises(Unauthenticated, match="not later"):
        check.check(_ISSUE, _signed(registry, worker, key, seconds=-1))
    check.check(_ISSUE, _signed(registry, worker, key, seconds=1))


@pytest.mark.parametrize("seconds", [-301, 301, 86_400])
def test_a_signature_of_another_time_is_refused_with_what_the_time_is(registry: Registry, seconds: float) -> None:
    worker, key = _worker(registry)
    with pytest.raises(Unauthenticated, match="clock") as caught:
        _authenticator(registry).check(_ISSUE, _signed(registry, worker, key, seconds=seconds))
    assert caught.value.metadata["server_time"] == registry.clock().isoformat()


def test_a_signature_by_another_key_or_for_another_worker_is_refused(registry: Registry) -> None:
    (worker, key), (other, other_key), check = _worker(registry), _worker(registry), _authenticator(registry)
    for signer, its_key in [(worker, other_key), (other, key), ("worker_none", key)]:
        with pytest.raises(Unauthenticated, match="no worker that is known"):
            check.check(_ISSUE, _signed(registry, signer, its_key))
    # Nor did those attempts keep the worker itself out.
    check.check(_ISSUE, _signed(registry, worker, key))


@pytest.mark.parametrize("value", ["", "a", "a.b.c", "a.1.!", "a.1", "a.1.AAAA.b", "a.1e9.AAAA", "a.1.\u00e9"])
def test_what_is_no_signature_is_refused(registry: Registry, value: str) -> None:
    with pytest.raises(Unauthenticated):
        _authenticator(registry).check(_ISSUE, f"Signature {value}")


def test_a_credential_is_good_for_its_life_and_in_the_form_it_was_given_in(registry: Registry) -> None:
    (worker, key), check = _worker(registry), _authenticator(registry)
    bearer = _bearer(registry, worker, key)
    for place in range(len("Bearer cbtm_session_"), len(bearer)):
        forged = bearer[:place] + ("0" if bearer[place] != "0" else "1") + bearer[place + 1 :]
        with pytest.raises(Unauthenticated, match="not of this coordinator"):
            check.check(_ACQUIRE, forged)
    registry.clock.advance(LIFE.total_seconds() - 1)
    check.check(_ACQUIRE, bearer)
    registry.clock.advance(1)
    with pytest.raises(Unauthenticated, match="expired"):
        check.check(_ACQUIRE, bearer)


def test_all_credentials_of_a_worker_are_one_caller_and_no_others(registry: Registry) -> None:
    """Whoever fetches many has no more than one's rate, and whoever makes one up takes nothing of another's."""
    worker_id, key = _worker(registry)
    authenticator = _authenticator(registry)
    first = _bearer(registry, worker_id, key)
    registry.clock.advance(10)
    second = _bearer(registry, worker_id, key)
    assert first != second
    assert authenticator.counted_as(first) == authenticator.counted_as(second)
    other_id, other_key = _worker(registry)
    strangers = [first[:-1] + ("0" if first[-1] != "0" else "1"), _bearer(registry, other_id, other_key), ""]
    assert authenticator.counted_as(first) not in {authenticator.counted_as(stranger) for stranger in strangers}
    assert authenticator.counted_as("Bearer token") == authenticator.counted_as(" bearer   token ".strip())


def test_a_replaced_key_is_good_for_nothing_and_what_it_got_neither(registry: Registry) -> None:
    worker, key = _worker(registry)
    bearer = _bearer(registry, worker, key)
    check = _authenticator(registry)
    principal = check.check(_ACQUIRE, bearer)
    with registry.store.writing() as tx:
        identities.replace_key(tx, registry.clock(), worker, public_key_of(new_key()).hex())
    with pytest.raises(Unauthenticated):
        check.check(_ISSUE, _signed(registry, worker, key))
    with registry.store.writing() as tx, pytest.raises(Unauthenticated):
        check_current(identities.seen(tx, registry.clock(), worker), principal)
    with pytest.raises(Unauthenticated):
        _authenticator(registry).check(_ACQUIRE, bearer)
