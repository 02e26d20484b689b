"""The channel between the parts: deadlines, retries, credentials, and errors that keep their type.

Guarantees: every call has a deadline; a call that failed in a way that may pass is tried again with jittered back-off
and the very same message (so the same `request_id`); what a server raised as a `CbtmError` arrives as that class.
Does not guarantee that a call happened at most once: that is what `request_id` is for.
"""

from __future__ import annotations

import random
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable
from urllib.parse import urlsplit

import grpc

from cbtm_api.v1 import admin_service_pb2_grpc, catalog_service_pb2_grpc, worker_service_pb2_grpc
from cbtm_common.errors import (
    RETRYABLE,
    Cancelled,
    CbtmError,
    InvalidArgument,
    Unauthenticated,
    Unavailable,
)
from cbtm_common.security import Security, Trust, check_insecure, split_token
from cbtm_common.wire_errors import error_of, retry_delay_of, unanswered_error

# Both sides: nothing that passes here is large, since files move by signed URLs.
MAX_MESSAGE_BYTES = 4 * 1024 * 1024
KEEPALIVE_SECONDS = 30
HTTP_PORT_METADATA = "cbtm-http-port"
_AUTHORIZATION = "authorization"
# A caller that leaves tries a call again for so long: a coordinator that restarts is back by then.
_LEAVING_SECONDS = 15.0
# A wait between attempts looks this often whether its caller leaves.
_LOOK_SECONDS = 0.1

CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_SECONDS * 1000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_retries", 0),
    # A coordinator that comes back should be noticed in seconds, not in gRPC's default of minutes.
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
)


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """`attempts` in all; waits grow from `initial` to `maximum` seconds, each drawn from half to all of it."""

    attempts: int = 6
    initial: float = 0.2
    maximum: float = 8.0

    def delay(self, attempt: int, chance: float) -> float:
        """Seconds to wait after failed attempt number `attempt` (from 0); `chance` in [0, 1)."""
        ceiling = min(self.maximum, self.initial * 2.0**attempt)
        return ceiling * (0.5 + 0.5 * chance)


@runtime_checkable
class Credential(Protocol):
    """A bearer that changes in the course of time."""

    def bearer(self) -> str:
        """What to show now; may make a call to get it."""
        ...

    def refused(self, bearer: str) -> bool:
        """Told that it was refused; whether there may be another one."""
        ...


class _Details(NamedTuple):
    method: str
    timeout: float | None
    metadata: Sequence[tuple[str, str | bytes]] | None
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _Interceptor(grpc.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Credential, deadline, retries, typed errors; notes where the HTTP endpoint is."""

    def __init__(
        self,
        *,
        target: str,
        credential: Callable[[], str | Credential | None],
        timeout: float,
        policy: RetryPolicy,
        on_metadata: Callable[[str], None],
        closed: threading.Event,
        leaving: threading.Event,
        shut_out: Callable[[], bool],
    ) -> None:
        self._target = target
        self._credential = credential
        self._timeout = timeout
        self._policy = policy
        self._on_metadata = on_metadata
        self._closed = closed
        self._leaving = leaving
        self._shut_out = shut_out
        # Whether a coordinator has answered yet.
        self._first = True

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        own = list(client_call_details.metadata or ())
        # What the caller itself signed is good once.
        signed = any(key == _AUTHORIZATION for key, _ in own)
        attempt, refreshed = 0, False
        begun = time.monotonic()
        while True:
            secret: str | None = None
            try:
                credential = None if signed else self._credential()
                secret = credential.bearer() if isinstance(credential, Credential) else credential
                return self._attempt(continuation, client_call_details, own, secret, request)
            except CbtmError as error:
                if self._closed.is_set():
                    raise
                if isinstance(error, Unauthenticated) and secret and not refreshed:
                    refreshed = True
                    if isinstance(credential, Credential) and credential.refused(secret):
                        continue
                if signed or not isinstance(error, RETRYABLE) or attempt + 1 >= self._policy.attempts:
                    raise
                cause = error.__cause__
                asked = retry_delay_of(cause) if isinstance(cause, grpc.RpcError) else None
                if self._is_over(asked or self._policy.delay(attempt, random.random()), begun):
                    raise
                attempt += 1

    def _is_over(self, seconds: float, begun: float) -> bool:
        """Waits before the next attempt; whether there shall be none."""
        end = time.monotonic() + seconds
        while not self._closed.is_set():
            now = time.monotonic()
            if self._leaving.is_set() and now - begun > _LEAVING_SECONDS:
                return True
            if now >= end:
                return False
            self._closed.wait(min(_LOOK_SECONDS, end - now))
        return True

    def _attempt(self, continuation: Any, given: Any, own: list[Any], secret: str | None, request: Any) -> Any:
        """The call, when it went well. Raises what the server raised, typed."""
        metadata = [*own, (_AUTHORIZATION, f"Bearer {secret}")] if secret else own
        details = _Details(given.method, given.timeout or self._timeout, metadata, None, None, None)
        call = continuation(details, request)
        error = call.exception()
        if error is None:
            self._first = False
            for key, value in (*(call.initial_metadata() or ()), *(call.trailing_metadata() or ())):
                if key == HTTP_PORT_METADATA:
                    self._on_metadata(value)
            return call
        if isinstance(error, CbtmError):
            # Ours, of opening the channel.
            raise error
        closed = self._closed.is_set()
        # A ValueError, of all things, says that another thread closed the channel.
        if closed and (not isinstance(error, grpc.RpcError) or error.code() is grpc.StatusCode.CANCELLED):
            raise Cancelled("the connection to the coordinator is closed") from error
        if not isinstance(error, grpc.RpcError):
            raise error
        unanswered = unanswered_error(self._target, error, first=self._first, shut_out=self._shut_out)
        if unanswered is not None:
            raise unanswered from error
        if error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
            self._first = False
        raise error_of(error) from error


class _ByName:
    """A channel whose calls name their method instead of holding a handle for it.

    gRPC makes such a handle at each call, and on a channel that another thread has just closed that crashes the
    process; a call by name raises ValueError there. The channel is opened by the first call.
    """

    def __init__(self, channel: Callable[[], grpc.Channel]) -> None:
        self._channel = channel

    def unary_unary(self, method: str, serializer: Any, deserializer: Any, _registered_method: bool = False) -> Any:
        return _Call(lambda: self._channel().unary_unary(method, serializer, deserializer))


class _Call:
    """One call to come; what opening the channel raises is raised where the call is made."""

    def __init__(self, multicallable: Callable[[], Any]) -> None:
        self._multicallable = multicallable

    def with_call(self, *arguments: Any, **options: Any) -> Any:
        return self._multicallable().with_call(*arguments, **options)


class Connection:
    """An open channel with the three services; a context manager.

    `target` is `host:port`. `token` may carry the fingerprint of the coordinator's authority, or else
    `fingerprint` is it; `security` is what else is known of it. The credential may be set later (a worker gets one by
    registering). `timeout` is in seconds for each attempt. Once `leaving` is set, no call is tried again that was begun
    more than a few seconds before. Errors are `CbtmError`s.
    """

    def __init__(
        self,
        target: str,
        *,
        token: str | None = None,
        fingerprint: str = "",
        security: Security | None = None,
        timeout: float = 30.0,
        policy: RetryPolicy | None = None,
        leaving: threading.Event | None = None,
    ) -> None:
        self.target = target
        self.host, self._port = host_and_port(target)
        secret, named = split_token(token) if token else (None, "")
        self.credential: str | Credential | None = secret
        self.fingerprint = named or fingerprint
        self._security = security or Security.from_environment()
        check_insecure(self.host, self._security.insecure)
        self._http_port = 8080
        self._closed = threading.Event()
        self._opening = threading.Lock()
        self._trust: Trust | None = None
        self._channel: grpc.Channel | None = None
        interceptor = _Interceptor(
            target=target,
            credential=lambda: self.credential,
            timeout=timeout,
            policy=policy or RetryPolicy(),
            on_metadata=self._note_http_port,
            closed=self._closed,
            leaving=leaving or threading.Event(),
            shut_out=lambda: self._trusted().is_shut_out(self.host, self._port),
        )
        calls: Any = _ByName(self._open)
        intercepted = grpc.intercept_channel(calls, interceptor)
        self.worker = worker_service_pb2_grpc.WorkerServiceStub(intercepted)
        self.catalog = catalog_service_pb2_grpc.CatalogServiceStub(intercepted)
        self.admin = admin_service_pb2_grpc.AdminServiceStub(intercepted)

    @property
    def http_base(self) -> str:
        """Where path-only signed URLs lead: the HTTP port that the coordinator names, on the host dialled."""
        return f"http{'' if self._security.insecure else 's'}://{self.host}:{self._http_port}"

    def http_context(self) -> ssl.SSLContext:
        """What to trust at `http_base`. Raises as the first call would."""
        return self._trusted().http_context()

    def _note_http_port(self, port: str) -> None:
        self._http_port = int(port)

    def _trusted(self) -> Trust:
        with self._opening:
            if self._trust is None:
                self._trust = self._security.trust(self.host, self._port, self.fingerprint)
            return self._trust

    def _open(self) -> grpc.Channel:
        trust = self._trusted()
        with self._opening:
            if self._channel is None:
                if self._closed.is_set():
                    raise Cancelled("the connection to the coordinator is closed")
                self._channel = trust.channel(self.target, CHANNEL_OPTIONS)
            return self._channel

    def wait_until_ready(self, timeout: float) -> bool:
        """Whether the channel connected within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                channel = self._open()
                break
            except Unavailable:
                if time.monotonic() > deadline or self._closed.wait(0.1):
                    return False
        try:
            grpc.channel_ready_future(channel).result(timeout=max(0.0, deadline - time.monotonic()))
        except grpc.FutureTimeoutError:
            return False
        return True

    def close(self) -> None:
        """Ends waiting retries and closes the channel."""
        self._closed.set()
        with self._opening:
            if self._channel is not None:
                self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def host_and_port(target: str) -> tuple[str, int]:
    """`host:port` in parts, brackets kept for IPv6. Raises InvalidArgument, naming what is expected."""
    parts = urlsplit(f"//{target}")
    try:
        port = parts.port
    except ValueError:
        port = None
    if not parts.hostname or port is None:
        raise InvalidArgument(
            f"coordinator: {target!r} is not HOST:PORT, such as 192.0.2.7:50051 (without http://)", field="coordinator"
        )
    return f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname, port


def connect(
    target: str,
    *,
    token: str | None = None,
    fingerprint: str = "",
    security: Security | None = None,
    timeout: float = 30.0,
    attempts: int = 6,
    leaving: threading.Event | None = None,
) -> Connection:
    """A Connection to the coordinator at `target`; no byte is sent until the first call.

    `security` is the environment's (`Security.from_environment`) where it is not given.
    """
    policy = RetryPolicy(attempts=attempts)
    return Connection(
        target,
        token=token,
        fingerprint=fingerprint,
        security=security,
        timeout=timeout,
        policy=policy,
        leaving=leaving,
    )
