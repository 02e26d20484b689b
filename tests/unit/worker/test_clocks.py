"""No decision rests on a worker's date: it may be hours off. Durations come from the monotonic clock."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.timestamp_pb2 import Timestamp

import cbtm_common
import cbtm_worker
from cbtm_api.v1 import worker_service_pb2 as ws

# Who reads the date, and why that decides nothing between machines.
_MAY_READ_THE_DATE = {
    "cbtm_worker/check.py": "tells the volunteer how far it is off",
    "cbtm_worker/credential.py": "names the time of what it signs; the coordinator judges it and tells its own",
    "cbtm_worker/task.py": "the age of files, by the clock that dated them",
    "cbtm_common/cache.py": "the age of files, by the clock that dated them",
    "cbtm_common/ids.py": "makes ids of one machine sort by their making",
}
_DATES = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}


def _readers() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for package in (cbtm_worker, cbtm_common):
        root = Path(package.__path__[0])
        for path in root.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
                if name.removeprefix("datetime.") in _DATES or name in _DATES:
                    found.setdefault(path.relative_to(root.parent).as_posix(), set()).add(name)
    return found


def test_only_these_modules_of_a_worker_read_the_date() -> None:
    assert set(_readers()) == set(_MAY_READ_THE_DATE)


def _holds_a_time(message: Descriptor, seen: frozenset[str] = frozenset()) -> bool:
    if message.full_name in seen:
        return False
    inner = [field.message_type for field in message.fields if field.message_type is not None]
    return any(
        kind.full_name == Timestamp.DESCRIPTOR.full_name or _holds_a_time(kind, seen | {message.full_name})
        for kind in inner
    )


@pytest.mark.parametrize("method", [m.name for m in ws.DESCRIPTOR.services_by_name["WorkerService"].methods])
def test_a_worker_tells_no_date(method: str) -> None:
    request = ws.DESCRIPTOR.services_by_name["WorkerService"].methods_by_name[method].input_type
    assert not _holds_a_time(request)


def test_a_date_of_the_coordinators_is_read_only_to_be_shown() -> None:
    readers = [
        path.name
        for path in Path(cbtm_worker.__path__[0]).rglob("*.py")
        if any(name in path.read_text("utf-8") for name in ("from_timestamp", "expire_time", "acquire_time"))
    ]
    assert readers == ["check.py"]
