"""What every call passes through, without a server: the handler that the interceptor makes is called as gRPC would."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_common.errors import CbtmError, NotFound, Unauthenticated
from cbtm_coordinator.services.auth import ADMIN_SERVICE, Principal, Role, caller
from cbtm_coordinator.services.interceptors import Call, ServerInterceptor

METHOD = f"/{ADMIN_SERVICE}/PauseRun"
ADMIN = Principal(role=Role.ADMIN, id="token_1")


class Aborted(Exception):
    pass


class Context:
    """The little of a ServicerContext that is used."""

    def __init__(self) -> None:
        self.trailing: Any = ()
        self.status: Any = None

    def set_trailing_metadata(self, metadata: Any) -> None:
        self.trailing = metadata

    def abort_with_status(self, status: Any) -> None:
        self.status = status
        raise Aborted

    @property
    def reason(self) -> str:
        info = ErrorInfo()
        call = SimpleNamespace(
            trailing_metadata=lambda: self.status.trailing_metadata,
            code=lambda: self.status.code,
            details=lambda: self.status.details,
        )
        details: Any = rpc_status.from_call(call)  # type: ignore[arg-type]  # the little of a call that is read
        assert details.details[0].Unpack(info)
        return info.reason


class Gatekeeper:
    """An authenticator that knows one caller, or refuses."""

    def __init__(self, error: CbtmError | None = None) -> None:
        self._error = error

    def check(self, method: str, authorization: str) -> Principal:
        if self._error is not None:
            raise self._error
        return ADMIN


def handler_of(behaviour: Any, seen: list[Call], *, authenticator: Any = None, draining: bool = False) -> Any:
    interceptor = ServerInterceptor(
        authenticator or Gatekeeper(), http_port=8080, draining=lambda: draining, observe=seen.append
    )
    details = SimpleNamespace(method=METHOD, invocation_metadata=(("authorization", "Bearer x"),))
    return interceptor.intercept_service(lambda _: grpc.unary_unary_rpc_method_handler(behaviour), details)


def test_a_call_knows_its_caller_and_tells_where_the_objects_are() -> None:
    seen: list[Call] = []
    context = Context()
    handler = handler_of(lambda request, _: caller.get(), seen)
    assert handler.unary_unary(ad.PauseRunRequest(request_id="r1"), context) == ADMIN
    assert context.trailing == (("cbtm-http-port", "8080"),)
    assert [(c.method, c.principal, c.request_id, c.error) for c in seen] == [(METHOD, ADMIN, "r1", None)]
    assert caller.get().role is Role.ANONYMOUS


def test_a_domain_error_keeps_its_type() -> None:
    def missing(request: Any, context: Any) -> Any:
        raise NotFound("run: there is no run 'x'")

    seen: list[Call] = []
    context = Context()
    with pytest.raises(Aborted):
        handler_of(missing, seen).unary_unary(ad.PauseRunRequest(), context)
    assert (context.status.code, context.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
    assert isinstance(seen[0].error, NotFound)


def test_a_defect_is_told_without_details(caplog: pytest.LogCaptureFixture) -> None:
    def broken(request: Any, context: Any) -> Any:
        raise RuntimeError("password=secret")

    seen: list[Call] = []
    context = Context()
    with pytest.raises(Aborted):
        handler_of(broken, seen).unary_unary(ad.PauseRunRequest(), context)
    assert (context.status.code, context.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in context.status.details
    assert "password=secret" in caplog.text, "the log has what the caller has not"


def test_a_caller_who_is_refused_reaches_nothing() -> None:
    seen: list[Call] = []
    context = Context()
    gatekeeper = Gatekeeper(Unauthenticated("who are you?"))
    handler = handler_of(lambda *_: pytest.fail("the service was called"), seen, authenticator=gatekeeper)
    with pytest.raises(Aborted):
        handler.unary_unary(ad.PauseRunRequest(), context)
    assert context.reason == "UNAUTHENTICATED"
    assert seen[0].principal is None


def test_a_coordinator_that_drains_sends_callers_elsewhere() -> None:
    context = Context()
    with pytest.raises(Aborted):
        handler_of(lambda *_: pytest.fail("the service was called"), [], draining=True).unary_unary(
            ad.PauseRunRequest(), context
        )
    assert context.reason == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("method", "is_open"),
    [("/grpc.health.v1.Health/Watch", True), (METHOD, False), ("/cbtm_api.v1.AdminService/Unheard", False)],
)
def test_a_stream_that_is_not_open_to_all_is_refused(method: str, is_open: bool) -> None:
    interceptor = ServerInterceptor(Gatekeeper(), http_port=0, draining=lambda: False)  # type: ignore[arg-type]
    stream = grpc.unary_stream_rpc_method_handler(lambda request, context: iter([b"data"]))
    found = interceptor.intercept_service(lambda _: stream, SimpleNamespace(method=method, invocation_metadata=()))
    if is_open:
        assert found is stream
        return
    context = Context()
    with pytest.raises(Aborted):
        found.stream_stream(iter([]), context)
    assert context.reason == "PERMISSION_DENIED"
