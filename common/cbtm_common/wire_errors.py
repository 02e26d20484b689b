"""Errors on the wire: a `CbtmError` as a `google.rpc.Status` and back, and what gRPC itself says of an address.

Total both ways: what has no reason of ours goes by its gRPC code.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from cbtm_common.errors import (
    ALL_ERRORS,
    DOMAIN,
    CbtmError,
    IntegrityError,
    InternalError,
    InvalidArgument,
    PermissionDenied,
    RateLimited,
    Unavailable,
)
from cbtm_common.security import not_in_tls

# Of several with one code, the first stands for a reason that is not known here.
_BY_CODE: dict[str, type[CbtmError]] = {error.code: error for error in reversed(ALL_ERRORS)}
# Codes that only gRPC itself makes.
_BY_CODE |= {"UNKNOWN": InternalError, "OUT_OF_RANGE": InvalidArgument}
_BY_REASON: dict[str, type[CbtmError]] = {error.reason: error for error in ALL_ERRORS}
# How gRPC tells that the other side ended the connection, whatever it said before.
_CLOSED = ("Socket closed", "Connection reset by peer", "Broken pipe")


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


def unanswered_error(
    target: str, error: grpc.RpcError, *, first: bool, shut_out: Callable[[], bool]
) -> CbtmError | None:
    """What to tell a person when gRPC itself, and no coordinator, said that `target` cannot be reached.

    At `first` contact what no other try would mend is an error of another kind. A coordinator that answered before
    may be about to get another certificate. `shut_out` finds out whether it wants one of ours.
    """
    call: Any = error
    if call.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return None
    if rpc_status.from_call(call) is not None:
        return None
    if call.code() is grpc.StatusCode.CANCELLED:
        # We cancel no call. A server does that to those which reach it while it goes down.
        return Unavailable(f"coordinator: {target} is going down or restarts", metadata={"target": target})
    details = call.details() or "no answer"
    if "CERTIFICATE_VERIFY_FAILED" in details:
        return (IntegrityError if first else Unavailable)(
            f"coordinator: {target} shows a certificate that is not trusted here; pass a token that carries its "
            "fingerprint (as it was handed out, with the part after the dot), or --ca-file",
            metadata={"target": target},
        )
    if "WRONG_VERSION_NUMBER" in details:
        return (InvalidArgument if first else Unavailable)(not_in_tls(target), metadata={"target": target})
    # gRPC nests what each address said, the cause last: "...; last error: UNKNOWN: ipv4:...: Connection refused".
    cause = details.rpartition(": ")[2].strip("[] ")
    if first and cause in _CLOSED and shut_out():
        return PermissionDenied(
            f"coordinator: {target} ends every connection from here; it lets in only clients with a certificate that "
            "it trusts: pass --cert-file and --key-file, as its owner gave them to you",
            metadata={"target": target},
        )
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
