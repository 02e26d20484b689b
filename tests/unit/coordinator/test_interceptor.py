"""What every call passes through, without a server: the handler that the interceptor makes is called as gRPC would."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from grpc_status import rpc_status

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_common.errors import CbtmError, DeadlineExceeded, NotFound, RateLimited, Unauthenticated
from cbtm_coordinator.limits import Limiter, Rates
from cbtm_coordinator.services import interceptors
from cbtm_coordinator.services.auth import ADMIN_SERVICE, Principal, Role, caller
from cbtm_coordinator.services.interceptors import Call, ServerInterceptor

METHOD = f"/{ADMIN_SERVICE}/PauseRun"
ADMIN = Principal(role=Role.ADMIN, id="token_1")


class Aborted(Exception):
    pass


class Context:
    """The little of a ServicerContext that is used."""

    def __init__(self, remaining: float | None = 30.0) -> None:
        self.trailing: Any = ()
        self.status: Any = None
        self._remaining = remaining

    def set_trailing_metadata(self, metadata: Any) -> None:
        self.trailing = metadata

    def time_remaining(self) -> float | None:
        return self._remaining

    def peer(self) -> str:
        return "ipv4:192.0.2.1:4000"

    async def abort_with_status(self, status: Any) -> None:
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

    def counted_as(self, authorization: str) -> str:
        return authorization


class Inline(Executor):
    """Works where it is told to."""

    def submit(self, work: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(work(*arguments, **named))
        except Exception as error:  # noqa: BLE001  # as an executor does
            done.set_exception(error)
        return done


def handler_of(
    behaviour: Any,
    seen: list[Call],
    *,
    authenticator: Any = None,
    draining: bool = False,
    rates: Rates = Rates(),  # noqa: B008
) -> Callable[..., Any]:
    """Calls the handler that the interceptor makes, as gRPC would."""
    interceptor = ServerInterceptor(
        authenticator or Gatekeeper(),
        limiter=Limiter(rates),
        executor=Inline(),
        http_port=8080,
        draining=lambda: draining,
        observe=seen.append,
    )
    details = SimpleNamespace(method=METHOD, invocation_metadata=(("authorization", "Bearer x"),))

    async def continuation(_: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(behaviour)

    async def requests(*given: Any) -> AsyncIterator[Any]:
        for request in given:
            yield request

    async def call(given: tuple[Any, ...], context: Context) -> Any:
        handler = await interceptor.intercept_service(continuation, details)
        return await handler.stream_unary(requests(*given), context)

    return lambda *given, context: asyncio.run(call(given, context))


def test_a_call_knows_its_caller_and_tells_where_the_objects_are() -> None:
    seen: list[Call] = []
    context = Context()
    handler = handler_of(lambda request, _: caller.get(), seen)
    assert handler(ad.PauseRunRequest(request_id="r1"), context=context) == ADMIN
    assert context.trailing == (("cbtm-http-port", "8080"),)
    assert [(c.method, c.principal, c.request_id, c.error) for c in seen] == [(METHOD, ADMIN, "r1", None)]
    assert caller.get().role is Role.ANONYMOUS


def test_a_domain_error_keeps_its_type() -> None:
    def missing(request: Any, context: Any) -> Any:
        raise NotFound("run: there is no run 'x'")

    seen: list[Call] = []
    context = Context()
    with pytest.raises(Aborted):
        handler_of(missing, seen)(ad.PauseRunRequest(), context=context)
    assert (context.status.code, context.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
    assert isinstance(seen[0].error, NotFound)


def test_a_defect_is_told_without_details(caplog: pytest.LogCaptureFixture) -> None:
    def broken(request: Any, context: Any) -> Any:
        raise RuntimeError("password=secret")

    seen: list[Call] = []
    context = Context()
    with pytest.raises(Aborted):
        handler_of(broken, seen)(ad.PauseRunRequest(), context=context)
    assert (context.status.code, context.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "secret" not in context.status.details
    assert "password=secret" in caplog.text, "the log has what the caller has not"


def test_a_caller_who_is_refused_reaches_nothing() -> None:
    seen: list[Call] = []
    context = Context()
    gatekeeper = Gatekeeper(Unauthenticated("who are you?"))
    handler = handler_of(lambda *_: pytest.fail("the service was called"), seen, authenticator=gatekeeper)
    with pytest.raises(Aborted):
        handler(ad.PauseRunRequest(), context=context)
    assert context.reason == "UNAUTHENTICATED"
    assert seen[0].principal is None


def test_a_coordinator_that_drains_sends_callers_elsewhere() -> None:
    context = Context()
    with pytest.raises(Aborted):
        handler_of(lambda *_: pytest.fail("the service was called"), [], draining=True)(
            ad.PauseRunRequest(), context=context
        )
    assert context.reason == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("method", "is_open"),
    [("/grpc.health.v1.Health/Watch", True), (METHOD, False), ("/cbtm_api.v1.AdminService/Unheard", False)],
)
def test_a_stream_that_is_not_open_to_all_is_refused(method: str, is_open: bool) -> None:
    interceptor = ServerInterceptor(
        Gatekeeper(),  # type: ignore[arg-type]
        limiter=Limiter(Rates()),
        executor=Inline(),
        http_port=0,
        draining=lambda: False,
    )
    stream = grpc.unary_stream_rpc_method_handler(lambda request, context: iter([b"data"]))

    async def continuation(_: Any) -> Any:
        return stream

    details = SimpleNamespace(method=method, invocation_metadata=())
    found = asyncio.run(interceptor.intercept_service(continuation, details))
    if is_open:
        assert found is stream
        return
    context = Context()
    with pytest.raises(Aborted):
        asyncio.run(found.stream_stream(iter([]), context))
    assert context.reason == "PERMISSION_DENIED"


@pytest.mark.parametrize("remaining", [None, float("inf"), 1e6])
def test_a_call_without_a_deadline_is_refused_before_its_caller_is_looked_at(remaining: float | None) -> None:
    seen: list[Call] = []
    context = Context(remaining)
    gatekeeper = Gatekeeper(Unauthenticated("who are you?"))
    with pytest.raises(Aborted):
        handler_of(lambda *_: None, seen, authenticator=gatekeeper)(ad.PauseRunRequest(), context=context)
    assert context.reason == "INVALID_ARGUMENT"
    assert "deadline" in context.status.details


def test_a_call_that_holds_no_request_is_refused() -> None:
    context = Context()
    with pytest.raises(Aborted):
        handler_of(lambda *_: None, [])(context=context)
    assert context.reason == "INVALID_ARGUMENT"


def test_a_call_that_sends_no_request_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptors, "_REQUEST_SECONDS", 0.0)

    async def never() -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield None

    with pytest.raises(DeadlineExceeded):
        asyncio.run(interceptors._only(never()))


def test_a_caller_over_its_rate_is_held_and_refused_without_being_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interceptors, "_HOLD_SECONDS", 0.0)
    seen: list[Call] = []
    served: list[Any] = []
    call = handler_of(lambda request, _: served.append(request), seen, rates=Rates(calls=0.1))
    call(ad.PauseRunRequest(), context=Context())
    context = Context()
    with pytest.raises(Aborted):
        call(ad.PauseRunRequest(), context=context)
    assert (context.status.code, context.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED")
    assert len(served) == 1
    assert [type(c.error) for c in seen] == [type(None), RateLimited]
