"""What every call passes through: authentication, errors to status, the HTTP port, and an observer's note of it.

Domain errors become `google.rpc.Status` here and nowhere else; what is not a domain error is a defect, logged with its
traceback and told as INTERNAL without details.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_status import rpc_status

from cbtm_common.errors import CbtmError, InternalError, PermissionDenied, Unavailable
from cbtm_common.rpc import HTTP_PORT_METADATA, status_of
from cbtm_coordinator.services.auth import Authenticator, Principal, Role, allowed_roles, caller

_log = logging.getLogger(__name__)


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
    """One line a call: refusals at INFO, defects at ERROR (with a traceback of their own), the rest at DEBUG."""
    who = f"{call.principal.role}:{call.principal.id}" if call.principal else "?"
    outcome = f"{call.error.reason}: {call.error.message}" if call.error else "OK"
    level = logging.DEBUG if call.error is None else logging.INFO
    if isinstance(call.error, InternalError):
        level = logging.ERROR
    where = (call.method, call.request_id or "-", who, 1000 * call.seconds, outcome)
    _log.log(level, "%s request %s by %s, %.1f ms: %s", *where)


class ServerInterceptor(grpc.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Wraps unary handlers, and refuses streaming ones that are not open to everybody (ours are all unary).

    `http_port` 0: the store serves its own URLs. `observe` is told of every call when it ends: for logs and metrics.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        *,
        http_port: int,
        draining: Callable[[], bool],
        observe: Callable[[Call], None] = log_call,
    ) -> None:
        self._authenticator = authenticator
        self._http_port = http_port
        self._draining = draining
        self._observe = observe

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None:
            return None
        if not handler.unary_unary:
            return handler if Role.ANONYMOUS in allowed_roles(method) else _refusing(method)
        metadata = dict(handler_call_details.invocation_metadata)
        behaviour = handler.unary_unary

        def serve(request: Any, context: grpc.ServicerContext) -> Any:
            started = time.monotonic()
            principal: Principal | None = None
            failure: CbtmError | None = None
            try:
                principal = self._authenticator.check(method, str(metadata.get("authorization", "")))
                if self._draining():
                    raise Unavailable("this coordinator is going down; try again")
                if self._http_port:
                    context.set_trailing_metadata(((HTTP_PORT_METADATA, str(self._http_port)),))
                token = caller.set(principal)
                try:
                    return behaviour(request, context)
                finally:
                    caller.reset(token)
            except CbtmError as error:
                failure = error
            except Exception:  # noqa: BLE001  # the edge of the process: a defect must not end the server
                _log.exception("%s failed", method)
                failure = InternalError("the coordinator failed; its log says why")
            finally:
                self._observe(
                    Call(
                        method=method,
                        principal=principal,
                        request_id=str(getattr(request, "request_id", "")),
                        seconds=time.monotonic() - started,
                        error=failure,
                    )
                )
            return context.abort_with_status(rpc_status.to_status(status_of(failure)))

        return grpc.unary_unary_rpc_method_handler(
            serve, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )


def _refusing(method: str) -> Any:
    def refuse(requests: Any, context: grpc.ServicerContext) -> Any:
        error = PermissionDenied(f"{method.rpartition('/')[2]} is a stream, and streams are not served")
        return context.abort_with_status(rpc_status.to_status(status_of(error)))

    return grpc.stream_stream_rpc_method_handler(refuse)
