"""Between protobuf's well-known types and Python's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

JsonValue = str | float | int | bool | None | list["JsonValue"] | dict[str, "JsonValue"]


def timestamp(when: datetime | None) -> Timestamp | None:
    """An aware datetime as a Timestamp; None stays unset."""
    if when is None:
        return None
    message = Timestamp()
    message.FromDatetime(when.astimezone(UTC))
    return message


def from_timestamp(message: Timestamp) -> datetime:
    """An aware datetime in UTC."""
    return message.ToDatetime(tzinfo=UTC)


def duration(length: timedelta | float) -> Duration:
    """From a timedelta, or from seconds."""
    message = Duration()
    message.FromTimedelta(length if isinstance(length, timedelta) else timedelta(seconds=length))
    return message


def from_duration(message: Duration) -> timedelta:
    return message.ToTimedelta()


def struct(values: Mapping[str, JsonValue]) -> Struct:
    """JSON-like values as a Struct. NaN and infinities, which JSON has no place for, become strings."""
    message = Struct()
    message.update({k: _finite(v) for k, v in values.items()})
    return message


def from_struct(message: Struct) -> dict[str, JsonValue]:
    return dict(MessageToDict(message))


def _finite(value: JsonValue) -> JsonValue:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
