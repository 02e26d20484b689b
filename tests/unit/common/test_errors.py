"""Errors keep their class, reason and metadata between server and caller."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from cbtm_common import errors
from cbtm_common.errors import (
    ALL_ERRORS,
    RETRYABLE,
    CbtmError,
    CheckpointRejected,
    InternalError,
    InvalidArgument,
    InvalidState,
    NotFound,
    RateLimited,
    ResourceExhausted,
    Unavailable,
)
from cbtm_common.wire_errors import error_of, retry_delay_of, status_of


class _Failed(grpc.RpcError):
    """A call that a server ended, as gRPC shows it to the caller."""

    def __init__(self, code: grpc.StatusCode, details: str, status: Status | None = None) -> None:
        super().__init__()
        self._code, self._details, self._status = code, details, status

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        if self._status is None:
            return ()
        return (("grpc-status-details-bin", self._status.SerializeToString()),)


def _received(error: CbtmError) -> CbtmError:
    status = status_of(error)
    sent = rpc_status.to_status(status)
    return error_of(_Failed(sent.code, sent.details, status))


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_every_error_arrives_as_itself(kind: type[CbtmError]) -> None:
    received = _received(kind("what is wrong", metadata={"run": "web", "field": "steps"}))
    assert type(received) is kind
    assert received.message == "what is wrong"
    assert received.metadata == {"run": "web", "field": "steps"}


def test_the_field_of_an_argument_travels() -> None:
    received = _received(InvalidArgument("steps: too few", field="steps"))
    assert isinstance(received, InvalidArgument)
    assert received.field == "steps"


def test_who_calls_too_often_is_told_how_long_to_wait() -> None:
    status = status_of(RateLimited("too many calls", retry_after=1.5))
    sent = rpc_status.to_status(status)
    failed = _Failed(sent.code, sent.details, status)
    assert retry_delay_of(failed) == 1.5
    assert error_of(failed).retry_after == 1.5  # type: ignore[attr-defined]
    general = error_of(_Failed(grpc.StatusCode.RESOURCE_EXHAUSTED, "from gRPC itself"))
    assert type(general) is ResourceExhausted


def test_every_error_class_is_listed_once_with_a_code_of_grpc_and_a_reason_of_its_own() -> None:
    defined = {c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, CbtmError)} - {CbtmError}
    assert defined == set(ALL_ERRORS)
    assert len({kind.reason for kind in ALL_ERRORS}) == len(ALL_ERRORS)
    assert all(kind.code in grpc.StatusCode.__members__ for kind in ALL_ERRORS)
    assert set(RETRYABLE) < set(ALL_ERRORS)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_every_code_of_grpc_has_an_error_also_without_details(code: grpc.StatusCode) -> None:
    error = error_of(_Failed(code, "from a proxy"))
    assert isinstance(error, CbtmError)
    assert error.message == "from a proxy"
    assert error_of(_Failed(code, "")).message == code.name


def test_a_reason_of_a_newer_server_falls_back_to_its_code() -> None:
    status = status_of(NotFound("gone"))
    info = ErrorInfo(reason="FROM_THE_FUTURE", domain=errors.DOMAIN)
    status.details[0].Pack(info)
    assert type(error_of(_Failed(grpc.StatusCode.NOT_FOUND, "gone", status))) is NotFound


def test_a_reason_unknown_to_an_older_peer_is_the_general_error_of_its_code() -> None:
    status = status_of(CheckpointRejected("not finite"))
    status.details[0].Pack(ErrorInfo(reason="FROM_THE_FUTURE", domain=errors.DOMAIN))
    assert type(error_of(_Failed(grpc.StatusCode.FAILED_PRECONDITION, "not finite", status))) is InvalidState


def test_a_reason_of_another_domain_is_not_ours() -> None:
    detail = AnyMessage()
    detail.Pack(ErrorInfo(reason="LEASE_LOST", domain="example.org"))
    status = Status(code=grpc.StatusCode.UNAVAILABLE.value[0], message="busy", details=[detail])
    assert type(error_of(_Failed(grpc.StatusCode.UNAVAILABLE, "busy", status))) is Unavailable


def test_a_code_that_nobody_chose_is_a_defect() -> None:
    assert type(error_of(_Failed(grpc.StatusCode.UNKNOWN, "?"))) is InternalError
