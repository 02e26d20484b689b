"""Who may call what. Every RPC stands in one table; one that does not is refused, and a test walks all of them."""

from __future__ import annotations

import contextvars
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from cbtm_common.errors import PermissionDenied, Unauthenticated
from cbtm_common.ids import hash_secret
from cbtm_coordinator.lifecycle import WorkerState
from cbtm_coordinator.store import Store, identities


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
        "ReleaseLease": _WORKER,
        "Probe": _JOIN | _WORKER,
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
            "DeleteRun",
            "GetRunStatus",
            "RequeueTask",
            "ListWorkers",
            "RevokeWorker",
            "CreateToken",
            "ListTokens",
            "RevokeToken",
            "ListEvents",
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
    """From the bearer secret of a call to its principal. `public_catalog` lets anybody read the catalog."""

    def __init__(self, store: Store, *, public_catalog: bool) -> None:
        self._store = store
        self._public_catalog = public_catalog

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
        with self._store.reading() as tx:
            worker = identities.find_worker(tx, digest)
            token = None if worker else identities.find_token(tx, self._store.now(), digest)
        if worker is not None:
            if worker.state is WorkerState.REVOKED:
                raise PermissionDenied(f"this worker was revoked by the owner: {worker.reason or 'no reason given'}")
            return Principal(role=Role.WORKER, id=worker.id)
        if token is None:
            raise Unauthenticated("this token is unknown, expired or revoked; ask the run's owner for a new one")
        return Principal(role=Role(token.role), id=token.id)


def _name(method: str) -> str:
    return method.rpartition("/")[2]
