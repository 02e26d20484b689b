"""Times, durations and JSON-like values survive protobuf."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

from google.protobuf.json_format import MessageToJson
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from cbtm_common.protos import duration, from_duration, from_struct, from_timestamp, struct, timestamp

_TIMES = st.datetimes(min_value=datetime(1, 1, 2), max_value=datetime(9999, 12, 30), timezones=st.just(UTC))


@given(_TIMES)
def test_a_time_survives(when: datetime) -> None:
    message = timestamp(when)
    assert message is not None
    assert from_timestamp(message) == when


def test_a_time_elsewhere_is_the_same_instant_in_utc() -> None:
    when = datetime(2026, 3, 1, 1, tzinfo=timezone(timedelta(hours=2)))
    message = timestamp(when)
    assert isinstance(message, Timestamp)
    assert from_timestamp(message) == datetime(2026, 2, 28, 23, tzinfo=UTC)


def test_no_time_stays_unset() -> None:
    assert timestamp(None) is None


@given(st.timedeltas(min_value=timedelta(days=-10_000), max_value=timedelta(days=10_000)))
def test_a_duration_survives(length: timedelta) -> None:
    assert from_duration(duration(length)) == length


def test_a_number_is_a_duration_in_seconds() -> None:
    assert from_duration(duration(1.5)) == timedelta(seconds=1.5)


def test_values_survive_and_numbers_that_json_does_not_have_become_strings() -> None:
    message = struct(
        {"loss": 2.5, "nan": float("nan"), "far": float("-inf"), "ok": True, "none": None, "l": [1.0, "a"]}
    )
    MessageToJson(message)
    assert from_struct(message) == {
        "loss": 2.5,
        "nan": "nan",
        "far": "-inf",
        "ok": True,
        "none": None,
        "l": [1.0, "a"],
    }
