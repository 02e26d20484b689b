"""Who may call what. Every RPC stands in one table; one that does not is refused, and a test walks all of them."""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from cbtm_common.errors import PermissionDenied, Unauthenticated
from cbtm_common.ids import hash_secret
from cbtm_common.keys import SIGNATURE, SignedRequest, key_id
from cbtm_coordinator.lifecycle import WorkerState
from cbtm_coordinator.services.credentials import Claims, Credentials
from cbtm_coordinator.store import Store, identities
from cbtm_coordinator.store.records import WorkerRecord


class Role(StrEnum):
    # A join token: may register a worker and probe the link, nothing else.
    JOIN = "WORKER"
    # A registered worker's short-lived credential.
    WORKER = "REGISTERED"
    # A signature by a worker's key: fetches such a credential, and nothing else.
    KEY = "KEY"
    CONSUMER = "CONSUMER"
    ADMIN = "ADMIN"
    # No token at all.
    ANONYMOUS = "ANONYMOUS"


@dataclass(frozen=True, kw_only=True)
class Principal:
    """Who calls: a worker's id, a token's id, or nobody. `key_id` is of the key by which a worker is known."""

    role: Role
    id: str = ""
    key_id: str = ""


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
        "IssueCredential": frozenset({Role.KEY}),
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
            "RecoverWorker",
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

# How far a worker's clock may be off.
_MAX_SKEW_SECONDS = 300.0
_UNKNOWN = (
    "this key is of no worker that is known here; join again with a token, or ask the owner to recover the worker"
)

_NOBODY = Principal(role=Role.ANONYMOUS)
# The caller of the RPC that this thread serves.
caller: contextvars.ContextVar[Principal] = contextvars.ContextVar("caller", default=_NOBODY)


def allowed_roles(method: str) -> frozenset[Role]:
    """Roles that may call `/package.Service/Method`; none for a method that is not in the table."""
    service, _, name = method.lstrip("/").partition("/")
    return _ALLOWED.get(service, {}).get(name, frozenset())


class Authenticator:
    """From the `authorization` of a call to its principal. `public_catalog` lets anybody read the catalog.

    A worker, once found, is remembered for `remember_seconds`, so that a renewal needs no question of its own. That one
    was revoked or got another key meanwhile, by any coordinator, takes effect all the same: its leases were ended with
    it, and what it does needs a lease or asks again (`check_current`). Tokens are looked up each time.
    """

    def __init__(
        self, store: Store, credentials: Credentials, *, public_catalog: bool, remember_seconds: float = 300.0
    ) -> None:
        self._store = store
        self._credentials = credentials
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
        secret = secret.strip()
        if kind == SIGNATURE and Role.KEY in roles:
            principal = self._signer(SignedRequest(secret))
        elif kind.lower() != "bearer" or not secret:
            raise Unauthenticated("authorization: is not 'Bearer SECRET'")
        elif self._credentials.is_one(secret):
            principal = self._worker(self._credentials.read(secret))
        else:
            principal = self._token(secret)
        if principal.role not in roles:
            need = " or ".join(sorted(role.value for role in roles)) or "nobody"
            raise PermissionDenied(f"{_name(method)} is for {need}; this token is {principal.role.value}")
        return principal

    def counted_as(self, authorization: str) -> str:
        """Whose calls these count as, without a look into the registry: all credentials of a worker are one caller.

        Others cannot use up its rate: it is known by our MAC. A token counts as itself, however the header is spelt.
        """
        secret = authorization.partition(" ")[2].strip()
        if self._credentials.is_one(secret):
            with contextlib.suppress(Unauthenticated):
                return f"worker {self._credentials.read(secret).worker_id}"
        return secret or authorization

    def _token(self, secret: str) -> Principal:
        # Looked up by its hash, so no comparison of secrets takes place whose time could tell anything.
        with self._store.reading() as tx:
            token = identities.find_token(tx, self._store.now(), hash_secret(secret))
        if token is None:
            raise Unauthenticated("this token is unknown, expired or revoked; ask the run's owner for a new one")
        return Principal(role=Role(token.role), id=token.id)

    def _worker(self, claims: Claims) -> Principal:
        principal = Principal(role=Role.WORKER, id=claims.worker_id, key_id=claims.key_id)
        if not self._workers.knows(principal):
            with self._store.reading() as tx:
                worker = identities.find_worker(tx, claims.worker_id)
            if worker is None:
                raise Unauthenticated(_UNKNOWN)
            check_current(worker, principal)
            self._workers.put(principal)
        return principal

    def _signer(self, signed: SignedRequest) -> Principal:
        with self._store.reading() as tx:
            worker = identities.find_worker(tx, signed.worker_id)
        key = worker.public_key if worker is not None else None
        if worker is None or key is None or not signed.is_by(bytes.fromhex(key)):
            raise Unauthenticated(_UNKNOWN)
        principal = Principal(role=Role.KEY, id=worker.id, key_id=key_id(bytes.fromhex(key)))
        check_current(worker, principal)
        now = self._store.now()
        told = {"server_time": now.isoformat(), "last_time_us": str(worker.signed_time_us)}
        if abs(signed.time_us - 1e6 * now.timestamp()) > 1e6 * _MAX_SKEW_SECONDS:
            raise Unauthenticated("what was signed is not of now; is this machine's clock right?", metadata=told)
        with self._store.writing(by_statement=True) as tx:
            if not identities.note_signed(tx, worker.id, key, signed.time_us):
                raise Unauthenticated("what was signed is not later than what was signed before", metadata=told)
        return principal


def check_current(worker: WorkerRecord, principal: Principal) -> None:
    """Raises PermissionDenied when the owner revoked this worker, Unauthenticated when it has another key by now."""
    if worker.state is WorkerState.REVOKED:
        raise PermissionDenied(f"this worker was revoked by the owner: {worker.reason or 'no reason given'}")
    if worker.public_key is None or key_id(bytes.fromhex(worker.public_key)) != principal.key_id:
        raise Unauthenticated(_UNKNOWN)


class _Remembered:
    """Principals, each for a while; thread-safe."""

    _MOST = 100_000

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._until: dict[Principal, float] = {}

    def knows(self, principal: Principal) -> bool:
        return time.monotonic() < self._until.get(principal, 0.0)

    def put(self, principal: Principal) -> None:
        if len(self._until) >= self._MOST:
            self._until.clear()
        self._until[principal] = time.monotonic() + self._seconds


def _name(method: str) -> str:
    return method.rpartition("/")[2]
