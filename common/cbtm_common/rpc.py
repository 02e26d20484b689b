"""The channel between the parts: deadlines, retries, credentials, and errors that keep their type.

Guarantees: every call has a deadline; a call that failed in a way that may pass is tried again with jittered back-off
and the very same message (so the same `request_id`); what a server raised as a `CbtmError` arrives as that class.
Does not guarantee that a call happened at most once: that is what `request_id` is for.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple, Self
from urllib.parse import urlsplit

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from cbtm_api.v1 import admin_service_pb2_grpc, catalog_service_pb2_grpc, worker_service_pb2_grpc
from cbtm_common.errors import (
    ALL_ERRORS,
    DOMAIN,
    RETRYABLE,
    Cancelled,
    CbtmError,
    InternalError,
    InvalidArgument,
    RateLimited,
    Unavailable,
)

# Both sides: nothing that passes here is large, since files move by signed URLs.
MAX_MESSAGE_BYTES = 4 * 1024 * 1024
KEEPALIVE_SECONDS = 30
HTTP_PORT_METADATA = "cbtm-http-port"

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

# Of several with one code, the first stands for a reason that is not known here.
_BY_CODE: dict[str, type[CbtmError]] = {error.code: error for error in reversed(ALL_ERRORS)}
# Codes that only gRPC itself makes.
_BY_CODE |= {"UNKNOWN": InternalError, "OUT_OF_RANGE": InvalidArgument}
_BY_REASON: dict[str, type[CbtmError]] = {error.reason: error for error in ALL_ERRORS}


def status_of(error: CbtmError) -> Status:
    """`error` as a `google.rpc.Status` with `ErrorInfo` (AIP-193)."""
    code = grpc.StatusCode[error.code]
    status = Status(code=code.value[0], message=error.message)
    detail = AnyMessage()
    detail.Pack(ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata))
    status.details.append(detail)
    if isinstance(error, RateLimited):
        wait = RetryInfo()
        wait.retry_delay.FromTimedelta(timedelta(seconds=error.retry_after))
        hint = AnyMessage()
        hint.Pack(wait)
        status.details.append(hint)
    return status


def error_of(error: grpc.RpcError) -> CbtmError:
    """What the server raised, of the same class; total over all codes."""
    call: Any = error
    status = rpc_status.from_call(call)
    if status is not None:
        for detail in status.details:
            info = ErrorInfo()
            if detail.Is(ErrorInfo.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
                kind = _BY_REASON.get(info.reason) or _BY_CODE[call.code().name]
                return kind(status.message, metadata=dict(info.metadata))
    return _BY_CODE[call.code().name](call.details() or call.code().name)


def _unanswered(target: str, error: grpc.RpcError) -> CbtmError | None:
    """What to tell a person when gRPC itself, and no coordinator, said that `target` cannot be reached."""
    call: Any = error
    if call.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return None
    if rpc_status.from_call(call) is not None:
        return None
    if call.code() is grpc.StatusCode.CANCELLED:
        # We cancel no call. A server does that to those which reach it while it goes down.
        return Unavailable(f"coordinator: {target} is going down or restarts", metadata={"target": target})
    # gRPC nests what each address said, the cause last: "...; last error: UNKNOWN: ipv4:...: Connection refused".
    cause = (call.details() or "no answer").rpartition(": ")[2].strip("[] ")
    return Unavailable(
        f"coordinator: {target} does not answer ({cause}); is `cbtm-coord serve` running there, and its port open?",
        metadata={"target": target},
    )


def retry_delay_of(error: grpc.RpcError) -> float | None:
    """Seconds that the server asks to wait (`google.rpc.RetryInfo`), if it does."""
    call: Any = error
    status = rpc_status.from_call(call)
    for detail in status.details if status is not None else ():
        info = RetryInfo()
        if detail.Is(RetryInfo.DESCRIPTOR) and detail.Unpack(info):
            seconds: float = info.retry_delay.ToTimedelta().total_seconds()
            return seconds
    return None


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
        credential: Callable[[], str | None],
        timeout: float,
        policy: RetryPolicy,
        on_metadata: Callable[[str], None],
        closed: threading.Event,
    ) -> None:
        self._target = target
        self._credential = credential
        self._timeout = timeout
        self._policy = policy
        self._on_metadata = on_metadata
        self._closed = closed

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        metadata = list(client_call_details.metadata or ())
        secret = self._credential()
        if secret:
            metadata.append(("authorization", f"Bearer {secret}"))
        details = _Details(
            client_call_details.method,
            client_call_details.timeout or self._timeout,
            metadata,
            None,
            None,
            None,
        )
        attempt = 0
        while True:
            call = continuation(details, request)
            error = call.exception()
            if error is None:
                for key, value in (*(call.initial_metadata() or ()), *(call.trailing_metadata() or ())):
                    if key == HTTP_PORT_METADATA:
                        self._on_metadata(value)
                return call
            if not isinstance(error, grpc.RpcError):
                # A ValueError, of all things, says that another thread closed the channel.
                if self._closed.is_set():
                    raise Cancelled("the connection to the coordinator is closed") from error
                raise error
            if self._closed.is_set() and error.code() is grpc.StatusCode.CANCELLED:
                raise Cancelled("the connection to the coordinator is closed") from error
            typed = _unanswered(self._target, error) or error_of(error)
            if not isinstance(typed, RETRYABLE) or attempt + 1 >= self._policy.attempts:
                raise typed from error
            delay = retry_delay_of(error) or self._policy.delay(attempt, random.random())
            if self._closed.wait(delay):
                raise typed from error
            attempt += 1


class _ByName:
    """A channel whose calls name their method instead of holding a handle for it.

    gRPC makes such a handle at each call, and on a channel that another thread has just closed that crashes the
    process; a call by name raises ValueError there.
    """

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def unary_unary(self, method: str, serializer: Any, deserializer: Any, _registered_method: bool = False) -> Any:
        return self._channel.unary_unary(method, serializer, deserializer)


class Connection:
    """An open channel with the three services; a context manager.

    `target` is `host:port`. The credential may be set later (a worker gets one by registering). `timeout` is in
    seconds for each attempt. Errors are `CbtmError`s.
    """

    def __init__(
        self,
        target: str,
        *,
        credential: str | None = None,
        timeout: float = 30.0,
        policy: RetryPolicy | None = None,
        channel: grpc.Channel | None = None,
    ) -> None:
        self.target = target
        self.credential = credential
        self.host = host_of(target)
        self._http_base: str | None = None
        self._closed = threading.Event()
        self._channel = channel or grpc.insecure_channel(target, options=list(CHANNEL_OPTIONS))
        interceptor = _Interceptor(
            target=target,
            credential=lambda: self.credential,
            timeout=timeout,
            policy=policy or RetryPolicy(),
            on_metadata=self._note_http_port,
            closed=self._closed,
        )
        calls: Any = _ByName(self._channel)
        intercepted = grpc.intercept_channel(calls, interceptor)
        self.worker = worker_service_pb2_grpc.WorkerServiceStub(intercepted)
        self.catalog = catalog_service_pb2_grpc.CatalogServiceStub(intercepted)
        self.admin = admin_service_pb2_grpc.AdminServiceStub(intercepted)

    @property
    def http_base(self) -> str:
        """Where path-only signed URLs lead: the HTTP port that the coordinator names, on the host dialled."""
        return self._http_base or f"http://{self.host}:8080"

    def _note_http_port(self, port: str) -> None:
        self._http_base = f"http://{self.host}:{int(port)}"

    def wait_until_ready(self, timeout: float) -> bool:
        """Whether the channel connected within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        try:
            grpc.channel_ready_future(self._channel).result(timeout=max(0.0, deadline - time.monotonic()))
        except grpc.FutureTimeoutError:
            return False
        return True

    def close(self) -> None:
        """Ends waiting retries and closes the channel."""
        self._closed.set()
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def host_of(target: str) -> str:
    """The host part of `host:port`, brackets kept for IPv6. Raises InvalidArgument, naming what is expected."""
    parts = urlsplit(f"//{target}")
    try:
        port = parts.port
    except ValueError:
        port = None
    if not parts.hostname or port is None:
        raise InvalidArgument(
            f"coordinator: {target!r} is not HOST:PORT, such as 192.0.2.7:50051 (without http://)", field="coordinator"
        )
    return f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname


def connect(target: str, *, credential: str | None = None, timeout: float = 30.0, attempts: int = 6) -> Connection:
    """A Connection to the coordinator at `target`; no byte is sent until the first call."""
    return Connection(target, credential=credential, timeout=timeout, policy=RetryPolicy(attempts=attempts))
