"""What every call passes through: authentication, errors to status, the HTTP port, and a log line.

Domain errors become `google.rpc.Status` here and nowhere else; what is not a domain error is a defect, logged with its
traceback and told as INTERNAL without details.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import grpc
from grpc_status import rpc_status

from cbtm_common.errors import CbtmError, InternalError, Unavailable
from cbtm_common.rpc import HTTP_PORT_METADATA, status_of
from cbtm_coordinator.services.auth import Authenticator, caller

_log = logging.getLogger(__name__)


class ServerInterceptor(grpc.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Wraps unary handlers. `http_port` 0: the store serves its own URLs."""

    def __init__(self, authenticator: Authenticator, *, http_port: int, draining: Callable[[], bool]) -> None:
        self._authenticator = authenticator
        self._http_port = http_port
        self._draining = draining

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        if handler is None or not handler.unary_unary:
            return handler
        method: str = handler_call_details.method
        metadata = dict(handler_call_details.invocation_metadata)
        behaviour = handler.unary_unary

        def serve(request: Any, context: grpc.ServicerContext) -> Any:
            started = time.monotonic()
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
                _log.info("%s refused: %s: %s", method, error.reason, error.message)
                context.abort_with_status(rpc_status.to_status(status_of(error)))
            except Exception:  # noqa: BLE001  # the edge of the process: a defect must not end the server
                _log.exception("%s failed", method)
                context.abort_with_status(
                    rpc_status.to_status(status_of(InternalError("the coordinator failed; its log says why")))
                )
            finally:
                _log.debug("%s took %.1f ms", method, 1000 * (time.monotonic() - started))

        return grpc.unary_unary_rpc_method_handler(
            serve, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer
        )
