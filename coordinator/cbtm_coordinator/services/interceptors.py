"""What every call passes through: deadline, rate, authentication, errors to status, the HTTP port, an observer's note.

Domain errors become `google.rpc.Status` here and nowhere else; what is not a domain error is a defect, logged with its
traceback and told as INTERNAL without details.

The event loop waits for callers, threads work: whoever opens a call and sends nothing, or reads nothing, holds a little
memory for as long as its deadline allows, and keeps nobody from being served.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_status import rpc_status

from cbtm_common.errors import (
    Cancelled,
    CbtmError,
    DeadlineExceeded,
    InternalError,
    InvalidArgument,
    PermissionDenied,
    RateLimited,
    Unauthenticated,
    Unavailable,
)
from cbtm_common.rpc import HTTP_PORT_METADATA
from cbtm_common.wire_errors import status_of
from cbtm_coordinator.limits import Limiter, address_of
from cbtm_coordinator.services.auth import Authenticator, Principal, Role, allowed_roles, caller

_log = logging.getLogger(__name__)

# A caller that may call again gives an answer up in this time at most.
MAX_DEADLINE_SECONDS = 900.0
# The request of a call must be there so soon after the call was opened.
_REQUEST_SECONDS = 10.0
# A refusal for calling too often is held back so long, of so many callers at once.
_HOLD_SECONDS = 1.0
_MOST_HELD = 4096


@dataclass(frozen=True, kw_only=True)
class Call:
    """What is known of a call when it ends. `principal` None: it was refused before its caller was known."""

    method: str
    principal: Principal | None
    # Empty for a call that changes nothing.
    request_id: str
    seconds: float
    error: CbtmError | None


def log_call(call: Call) -> None:
    """One line a call: refusals at INFO, defects at ERROR (with a traceback of their own), the rest at DEBUG.

    What is refused for its rate is not worth a line each: there are too many.
    """
    who = f"{call.principal.role}:{call.principal.id}" if call.principal else "?"
    outcome = f"{call.error.reason}: {call.error.message}" if call.error else "OK"
    level = logging.DEBUG if call.error is None or isinstance(call.error, RateLimited) else logging.INFO
    if isinstance(call.error, InternalError):
        level = logging.ERROR
    where = (call.method, call.request_id or "-", who, 1000 * call.seconds, outcome)
    _log.log(level, "%s request %s by %s, %.1f ms: %s", *where)


class ServerInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Wraps unary handlers, and refuses streaming ones that are not open to everybody (ours are all unary).

    `executor` runs what may block: authentication, and handlers that are no coroutines. `http_port` 0: the store
    serves its own URLs. `observe` is told of every call when it ends: for logs and metrics.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        *,
        limiter: Limiter,
        executor: Executor,
        http_port: int,
        draining: Callable[[], bool],
        observe: Callable[[Call], None] = log_call,
    ) -> None:
        self._authenticator = authenticator
        self._limiter = limiter
        self._executor = executor
        self._http_port = http_port
        self._draining = draining
        self._observe = observe
        self._held = 0

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None:
            return None
        if not handler.unary_unary:
            return self._metered(method, handler) if Role.ANONYMOUS in allowed_roles(method) else _refusing(method)
        authorization = str(dict(handler_call_details.invocation_metadata).get("authorization", ""))
        behaviour = handler.unary_unary

        async def serve(requests: AsyncIterator[Any], context: Any) -> Any:
            started = time.monotonic()
            served = _Served()
            failure: CbtmError | None = None
            try:
                return await self._serve(method, authorization, behaviour, requests, context, served)
            except CbtmError as error:
                failure = error
            except Exception:  # noqa: BLE001  # the edge of the process: a defect must not end the server
                _log.exception("%s failed", method)
                failure = InternalError("the coordinator failed; its log says why")
            except asyncio.CancelledError:
                failure = Cancelled("the caller gave up")
                raise
            finally:
                seconds = time.monotonic() - started
                self._observe(
                    Call(
                        method=method,
                        principal=served.principal,
                        request_id=served.request_id,
                        seconds=seconds,
                        error=failure,
                    )
                )
            if isinstance(failure, RateLimited):
                await self._hold()
            return await context.abort_with_status(rpc_status.to_status(status_of(failure)))

        # On the wire it is the same; but gRPC gives the waiting for the one request to us.
        return grpc.stream_unary_rpc_method_handler(
            serve, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )

    def _metered(self, method: str, handler: Any) -> Any:
        """Each request of a stream counts as a call: one stream could else keep the event loop to itself."""
        if not handler.stream_stream:
            return handler
        behaviour = handler.stream_stream

        async def serve(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            address = address_of(context.peer())

            async def admitted() -> AsyncIterator[Any]:
                async for request in requests:
                    self._limiter.admit(method, "", address)
                    yield request

            try:
                async for answer in behaviour(admitted(), context):
                    yield answer
            except RateLimited as error:
                await context.abort_with_status(rpc_status.to_status(status_of(error)))

        return grpc.stream_stream_rpc_method_handler(
            serve, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )

    async def _serve(
        self,
        method: str,
        authorization: str,
        behaviour: Callable[[Any, Any], Any],
        requests: AsyncIterator[Any],
        context: Any,
        served: _Served,
    ) -> Any:
        _check_deadline(method, context.time_remaining())
        address = address_of(context.peer())
        self._limiter.admit(method, self._authenticator.counted_as(authorization), address)
        request = await _only(requests)
        served.request_id = str(getattr(request, "request_id", ""))

        def work() -> Any:
            served.principal = self._authenticator.check(method, authorization)
            if self._draining():
                raise Unavailable("this coordinator is going down; try again")
            token = caller.set(served.principal)
            try:
                return behaviour(request, context)
            finally:
                caller.reset(token)

        if self._http_port:
            context.set_trailing_metadata(((HTTP_PORT_METADATA, str(self._http_port)),))
        try:
            answer = await asyncio.get_running_loop().run_in_executor(self._executor, work)
        except Unauthenticated:
            if authorization:
                self._limiter.refused(address)
            raise
        return await answer if inspect.isawaitable(answer) else answer

    async def _hold(self) -> None:
        """Whoever calls again at once, without waiting as it was told, is slowed down."""
        if self._held >= _MOST_HELD:
            return
        self._held += 1
        try:
            await asyncio.sleep(_HOLD_SECONDS)
        finally:
            self._held -= 1


@dataclass
class _Served:
    """What a call turned out to be."""

    principal: Principal | None = None
    request_id: str = ""


def _check_deadline(method: str, remaining: float | None) -> None:
    """gRPC itself ends a call at its deadline, on this side too; one without would be held for ever."""
    if remaining is None or math.isinf(remaining) or remaining > MAX_DEADLINE_SECONDS:
        raise InvalidArgument(
            f"deadline: {method.rpartition('/')[2]} needs one of at most {MAX_DEADLINE_SECONDS:.0f} s "
            "(grpcurl: -max-time 10)",
            field="deadline",
        )


async def _only(requests: AsyncIterator[Any]) -> Any:
    """The one request of a unary call."""
    try:
        async with asyncio.timeout(_REQUEST_SECONDS):
            return await anext(aiter(requests))
    except TimeoutError as error:
        raise DeadlineExceeded(f"the request did not come within {_REQUEST_SECONDS:.0f} s") from error
    except StopAsyncIteration as error:
        raise InvalidArgument("the call holds no request") from error


def _refusing(method: str) -> Any:
    async def refuse(requests: Any, context: Any) -> None:
        error = PermissionDenied(f"{method.rpartition('/')[2]} is a stream, and streams are not served")
        await context.abort_with_status(rpc_status.to_status(status_of(error)))

    return grpc.stream_stream_rpc_method_handler(refuse)
