"""Every error that crosses a boundary of cbtm, and its gRPC code and reason.

    CbtmError
    ├── InvalidArgument      INVALID_ARGUMENT     a field is wrong; `field` names it
    ├── NotFound             NOT_FOUND            no such run, cluster, task, worker, object
    ├── AlreadyExists        ALREADY_EXISTS       the name is taken
    ├── InvalidState         FAILED_PRECONDITION  not in this state
    ├── CheckpointRejected   FAILED_PRECONDITION  its content is no honest work of this task; it will not be taken again
    ├── LeaseLost            ABORTED              the lease's epoch is stale, or it ended
    ├── Unauthenticated      UNAUTHENTICATED      no valid token or credential
    ├── PermissionDenied     PERMISSION_DENIED    a valid one, without this right
    ├── ResourceExhausted    RESOURCE_EXHAUSTED   a limit or a disk is full
    │   └── RateLimited                           too many calls at once; try again when it says
    ├── IntegrityError       DATA_LOSS            bytes are not what their digest says
    ├── Unavailable          UNAVAILABLE          a server cannot be reached, or is draining; try again
    ├── DeadlineExceeded     DEADLINE_EXCEEDED    no answer in time; try again
    ├── Unimplemented        UNIMPLEMENTED        the peer is older than this call
    ├── Cancelled            CANCELLED            the caller gave up
    └── InternalError        INTERNAL             a defect; says so

Services raise these; one interceptor turns them into `google.rpc.Status` with `ErrorInfo`, and one on the
caller's side turns them back (`cbtm_common.rpc`). Nobody parses a message. `reason` is what programs compare.
"""

from __future__ import annotations

from typing import ClassVar

DOMAIN = "cbtm"


class CbtmError(Exception):
    """Base of all errors of cbtm.

    `message` is for a person: it names what is wrong and what to do. `metadata` is for programs.
    """

    code: ClassVar[str] = "UNKNOWN"
    reason: ClassVar[str] = "UNKNOWN"

    def __init__(self, message: str, *, metadata: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.metadata = dict(metadata or {})


class InvalidArgument(CbtmError):
    code = "INVALID_ARGUMENT"
    reason = "INVALID_ARGUMENT"

    def __init__(self, message: str, *, field: str = "", metadata: dict[str, str] | None = None) -> None:
        super().__init__(message, metadata={**(metadata or {}), **({"field": field} if field else {})})

    @property
    def field(self) -> str:
        return self.metadata.get("field", "")


class NotFound(CbtmError):
    code = "NOT_FOUND"
    reason = "NOT_FOUND"


class AlreadyExists(CbtmError):
    code = "ALREADY_EXISTS"
    reason = "ALREADY_EXISTS"


class InvalidState(CbtmError):
    code = "FAILED_PRECONDITION"
    reason = "INVALID_STATE"


class CheckpointRejected(CbtmError):
    """`metadata` is the evidence: the check that failed, the file and tensor, what was found and what is allowed."""

    code = "FAILED_PRECONDITION"
    reason = "CHECKPOINT_REJECTED"


class LeaseLost(CbtmError):
    code = "ABORTED"
    reason = "LEASE_LOST"


class Unauthenticated(CbtmError):
    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"


class PermissionDenied(CbtmError):
    code = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"


class ResourceExhausted(CbtmError):
    code = "RESOURCE_EXHAUSTED"
    reason = "RESOURCE_EXHAUSTED"


class RateLimited(ResourceExhausted):
    """`retry_after`: seconds until a call would be served; also in the status, as `google.rpc.RetryInfo`."""

    reason = "RATE_LIMITED"

    def __init__(self, message: str, *, retry_after: float = 0.0, metadata: dict[str, str] | None = None) -> None:
        hint = {"retry_after": f"{retry_after:.3f}"} if retry_after else {}
        super().__init__(message, metadata={**hint, **(metadata or {})})

    @property
    def retry_after(self) -> float:
        return float(self.metadata.get("retry_after", 0.0))


class IntegrityError(CbtmError):
    code = "DATA_LOSS"
    reason = "INTEGRITY"


class Unavailable(CbtmError):
    code = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class DeadlineExceeded(CbtmError):
    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class Unimplemented(CbtmError):
    code = "UNIMPLEMENTED"
    reason = "UNIMPLEMENTED"


class Cancelled(CbtmError):
    code = "CANCELLED"
    reason = "CANCELLED"


class InternalError(CbtmError):
    code = "INTERNAL"
    reason = "INTERNAL"


ALL_ERRORS: tuple[type[CbtmError], ...] = (
    InvalidArgument,
    NotFound,
    AlreadyExists,
    InvalidState,
    CheckpointRejected,
    LeaseLost,
    Unauthenticated,
    PermissionDenied,
    ResourceExhausted,
    RateLimited,
    IntegrityError,
    Unavailable,
    DeadlineExceeded,
    Unimplemented,
    Cancelled,
    InternalError,
)

RETRYABLE: tuple[type[CbtmError], ...] = (Unavailable, DeadlineExceeded, RateLimited)
