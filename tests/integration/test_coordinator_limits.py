"""What is too large is refused before it is read, on both sides; and a peer that is gone is noticed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from cbtm_api.v1 import catalog_service_pb2 as cs
from cbtm_api.v1.catalog_service_pb2_grpc import CatalogServiceServicer, add_CatalogServiceServicer_to_server
from cbtm_common.errors import DeadlineExceeded, ResourceExhausted
from cbtm_common.rpc import CHANNEL_OPTIONS, MAX_MESSAGE_BYTES, Connection, RetryPolicy, connect
from cbtm_common.security import Security
from cbtm_coordinator.grpc_server import SERVER_OPTIONS
from tests.support.coordinator import RunningCoordinator

pytestmark = pytest.mark.integration
_UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
_TOO_LARGE = MAX_MESSAGE_BYTES + 1


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_a_call_that_is_too_large_is_refused_by_its_length_and_not_read(coordinator: RunningCoordinator) -> None:
    """By a caller that knows no limit, and no credential either: nobody's authority is asked for."""
    large = bytes(256 << 20)
    before = _resident_bytes(coordinator.process.pid)
    with coordinator.channel(_UNLIMITED) as channel:
        call = channel.unary_unary("/cbtm_api.v1.CatalogService/Route", bytes, bytes)
        with pytest.raises(grpc.RpcError) as caught:
            call(large, timeout=60)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
    assert str(len(large)) in caught.value.details()  # type: ignore[attr-defined]
    assert _resident_bytes(coordinator.process.pid) - before < 64 << 20
    assert "ERROR" not in coordinator.log


class _Answers(CatalogServiceServicer):
    """A coordinator that answers too much, or never."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def Route(self, request: cs.RouteRequest, context: grpc.ServicerContext) -> cs.RouteResponse:
        response = cs.RouteResponse()
        response.routings.add().weights.add(cluster_id="x" * _TOO_LARGE)
        return response

    def ListRuns(self, request: cs.ListRunsRequest, context: grpc.ServicerContext) -> cs.ListRunsResponse:
        self.released.wait(30)
        return cs.ListRunsResponse()


@pytest.fixture
def strange() -> Iterator[str]:
    """The address of a server without limits."""
    servicer = _Answers()
    server = grpc.server(ThreadPoolExecutor(2), options=_UNLIMITED)
    add_CatalogServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    servicer.released.set()
    server.stop(0).wait()


def test_an_answer_that_is_too_large_is_refused_by_its_length(strange: str) -> None:
    with (
        connect(strange, security=Security(insecure=1), attempts=1) as connection,
        pytest.raises(ResourceExhausted, match="larger than max"),
    ):
        connection.catalog.Route(cs.RouteRequest())


def test_every_call_has_a_deadline_also_when_its_caller_names_none(strange: str) -> None:
    hasty = Connection(strange, security=Security(insecure=1), timeout=0.2, policy=RetryPolicy(attempts=1))
    with hasty as connection, pytest.raises(DeadlineExceeded):
        connection.catalog.ListRuns(cs.ListRunsRequest())


@pytest.mark.parametrize("options", [CHANNEL_OPTIONS, SERVER_OPTIONS], ids=["caller", "coordinator"])
def test_both_sides_notice_a_peer_that_is_gone(options: Sequence[tuple[str, int]]) -> None:
    known = dict(options)
    assert known["grpc.keepalive_time_ms"] + known["grpc.keepalive_timeout_ms"] <= 60_000
    assert known["grpc.keepalive_permit_without_calls"] == 1
    for direction in ("send", "receive"):
        assert known[f"grpc.max_{direction}_message_length"] == MAX_MESSAGE_BYTES
    # Who pings more often than the other side allows is cut off.
    assert dict(SERVER_OPTIONS)["grpc.http2.min_recv_ping_interval_without_data_ms"] < known["grpc.keepalive_time_ms"]
