"""Who may call what. Every RPC stands in one table; one that does not is refused, and a test walks all of them."""

from __future__ import annotations

import contextvars
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from cbtm_common.errors import PermissionDenied, Unauthenticated
from cbtm_common.ids import hash_secret
from cbtm_coordinator.lifecycle import WorkerState
from cbtm_coordinator.store import Store, identities
from cbtm_coordinator.store.records import WorkerRecord


class Role(StrEnum):
    # A join token: may register a worker and probe the link, nothing else.
    JOIN = "WORKER"
    # A registered worker's own credential.
    WORKER = "REGISTERED"
    CONSUMER = "CONSUMER"
    ADMIN = "ADMIN"
    # No token at all.
    ANONYMOUS = "ANONYMOUS"


@dataclass(frozen=True, kw_only=True)
class Principal:
    """Who calls: a worker's id, a token's id, or nobody."""

    role: Role
    id: str = ""


_JOIN = frozenset({Role.JOIN})
_WORKER = frozenset({Role.WORKER})
# Not workers: who trains an expert never sees what it will be judged on.
_READ = frozenset({Role.CONSUMER, Role.ADMIN})
_ADMIN = frozenset({Role.ADMIN})

WORKER_SERVICE = "cbtm_api.v1.WorkerService"
CATALOG_SERVICE = "cbtm_api.v1.CatalogService"
ADMIN_SERVICE = "cbtm_api.v1.AdminService"

# Service, then method, to the roles that may call it.
_ALLOWED: Mapping[str, Mapping[str, frozenset[Role]]] = {
    WORKER_SERVICE: {
        "Register": _JOIN,
        "AcquireLease": _WORKER,
        "RenewLease": _WORKER,
        "ListTaskShards": _WORKER,
        "PrepareDownload": _WORKER,
        "PrepareUpload": _WORKER,
        "CommitCheckpoint": _WORKER,
        "ReportCheck": _WORKER,
        "ReleaseLease": _WORKER,
        "Probe": _JOIN | _WORKER,
        "GetReceipt": _WORKER,
    },
    CATALOG_SERVICE: dict.fromkeys(
        (
            "ListRuns",
            "GetRun",
            "ListClusters",
            "ListExperts",
            "ListShards",
            "GetRunFiles",
            "PrepareDownload",
            "Route",
            "GetReceiptKey",
        ),
        _READ,
    ),
    ADMIN_SERVICE: dict.fromkeys(
        (
            "CreateRun",
            "PrepareRunUpload",
            "RegisterClusters",
            "StartRun",
            "CreateBaseline",
            "PauseRun",
            "ResumeRun",
            "SetRunRouting",
            "DeleteRun",
            "SetVerification",
            "GetRunStatus",
            "RequeueTask",
            "ListWorkers",
            "RevokeWorker",
            "CreateToken",
            "ListTokens",
            "RevokeToken",
            "ListEvents",
            "GetLeaderboard",
            "IssueReceipt",
        ),
        _ADMIN,
    ),
    # Health is for load balancers, reflection for people with grpcurl; neither tells anything of a run.
    "grpc.health.v1.Health": dict.fromkeys(("Check", "Watch", "List"), frozenset(Role)),
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": frozenset(Role)},
}

_NOBODY = Principal(role=Role.ANONYMOUS)
# The caller of the RPC that this thread serves.
caller: contextvars.ContextVar[Principal] = contextvars.ContextVar("caller", default=_NOBODY)


def allowed_roles(method: str) -> frozenset[Role]:
    """Roles that may call `/package.Service/Method`; none for a method that is not in the table."""
    service, _, name = method.lstrip("/").partition("/")
    return _ALLOWED.get(service, {}).get(name, frozenset())


class Authenticator:
    """From the bearer secret of a call to its principal. `public_catalog` lets anybody read the catalog.

    A worker, once found, is remembered for `remember_seconds`, so that a renewal needs no question of its own. That one
    was revoked meanwhile, by any coordinator, takes effect all the same: its leases were ended with it, and what it
    does needs a lease or asks again (`check_active`). Tokens are looked up each time.
    """

    def __init__(self, store: Store, *, public_catalog: bool, remember_seconds: float = 300.0) -> None:
        self._store = store
        self._public_catalog = public_catalog
        self._workers = _Remembered(remember_seconds)

    def check(self, method: str, authorization: str) -> Principal:
        """The caller of `method`. Raises Unauthenticated for a bad secret, PermissionDenied for a lacking right."""
        roles = allowed_roles(method)
        if Role.ANONYMOUS in roles:
            return Principal(role=Role.ANONYMOUS)
        if not authorization:
            if self._public_catalog and method.startswith(f"/{CATALOG_SERVICE}/"):
                return Principal(role=Role.ANONYMOUS)
            raise Unauthenticated(f"{_name(method)} needs a token: pass --token, or set CBTM_TOKEN")
        kind, _, secret = authorization.partition(" ")
        if kind.lower() != "bearer" or not secret:
            raise Unauthenticated("authorization: is not 'Bearer SECRET'")
        principal = self._principal(secret.strip())
        if principal.role not in roles:
            need = " or ".join(sorted(role.value for role in roles)) or "nobody"
            raise PermissionDenied(f"{_name(method)} is for {need}; this token is {principal.role.value}")
        return principal

    def _principal(self, secret: str) -> Principal:
        # Looked up by its hash, so no comparison of secrets takes place whose time could tell anything.
        digest = hash_secret(secret)
        known = self._workers.get(digest)
        if known is not None:
            return known
        with self._store.reading() as tx:
            worker = identities.find_worker(tx, digest)
            token = None if worker else identities.find_token(tx, self._store.now(), digest)
        if worker is not None:
            check_active(worker)
            principal = Principal(role=Role.WORKER, id=worker.id)
            self._workers.put(digest, principal)
            return principal
        if token is None:
            raise Unauthenticated("this token is unknown, expired or revoked; ask the run's owner for a new one")
        return Principal(role=Role(token.role), id=token.id)


def check_active(worker: WorkerRecord) -> None:
    """Raises PermissionDenied when the owner revoked this worker."""
    if worker.state is WorkerState.REVOKED:
        raise PermissionDenied(f"this worker was revoked by the owner: {worker.reason or 'no reason given'}")


class _Remembered:
    """Principals by the hash of their secret, each for a while; thread-safe."""

    _MOST = 100_000

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: dict[str, tuple[float, Principal]] = {}

    def get(self, digest: str) -> Principal | None:
        until, principal = self._until.get(digest, (0.0, None))
        return principal if time.monotonic() < until else None

    def put(self, digest: str, principal: Principal) -> None:
        if len(self._until) >= self._MOST:
            self._until.clear()
        self._until[digest] = (time.monotonic() + self._seconds, principal)


def _name(method: str) -> str:
    return method.rpartition("/")[2]
