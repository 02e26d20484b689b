"""A connection with nobody at the other end, or closed under a call. No server is needed: nothing listens."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from cbtm_api.v1 import catalog_service_pb2 as cs
from cbtm_common import rpc
from cbtm_common.errors import Cancelled, CbtmError, InvalidArgument, Unavailable
from cbtm_common.rpc import Connection, RetryPolicy, connect, host_and_port


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address that is taken, so that nobody else listens there, and that does not listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def test_an_address_that_does_not_answer_is_named_with_what_to_do(nobody: str) -> None:
    with (
        connect(nobody, attempts=1) as connection,
        pytest.raises(Unavailable, match=rf"{nobody} does not answer .*cbtm-coord serve"),
    ):
        connection.catalog.ListRuns(cs.ListRunsRequest())


def test_a_call_on_a_closed_connection_is_cancelled(nobody: str) -> None:
    connection = connect(nobody)
    connection.close()
    with pytest.raises(Cancelled):
        connection.catalog.ListRuns(cs.ListRunsRequest())


def test_closing_ends_a_call_that_waits_to_try_again(nobody: str) -> None:
    connection = Connection(nobody, policy=RetryPolicy(attempts=100, initial=3600, maximum=3600))
    raised: list[CbtmError] = []

    def call() -> None:
        try:
            connection.catalog.ListRuns(cs.ListRunsRequest())
        except CbtmError as error:
            raised.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    connection.close()
    caller.join(20)
    assert [type(error) for error in raised] in ([Unavailable], [Cancelled])


def test_who_leaves_has_its_calls_tried_again_for_a_moment_only(nobody: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leaving = threading.Event()
    leaving.set()
    monkeypatch.setattr(rpc, "_LEAVING_SECONDS", 0.5)
    policy = RetryPolicy(attempts=100, initial=0.2, maximum=3600)
    with Connection(nobody, policy=policy, leaving=leaving) as connection:
        started = time.monotonic()
        with pytest.raises(Unavailable):
            connection.catalog.ListRuns(cs.ListRunsRequest())
    assert 0.5 < time.monotonic() - started < 20


def test_closing_while_others_call_never_ends_the_process(nobody: str) -> None:
    for _ in range(10):
        connection = Connection(nobody, policy=RetryPolicy(attempts=1))
        raised: list[type[Exception]] = []

        def call(connection: Connection = connection, raised: list[type[Exception]] = raised) -> None:
            for _ in range(3):
                try:
                    connection.catalog.ListRuns(cs.ListRunsRequest())
                except CbtmError as error:
                    raised.append(type(error))

        callers = [threading.Thread(target=call) for _ in range(3)]
        for caller in callers:
            caller.start()
        connection.close()
        for caller in callers:
            caller.join(20)
        assert len(raised) == 9
        assert set(raised) <= {Unavailable, Cancelled}


@pytest.mark.parametrize("target", ["", "host", "http://host:1", "host:port", "host:99999", ":50051"])
def test_a_target_that_is_no_address_says_what_one_looks_like(target: str) -> None:
    with pytest.raises(InvalidArgument, match="HOST:PORT"):
        connect(target)


def test_ipv6_keeps_its_brackets() -> None:
    assert host_and_port("[::1]:50051") == ("[::1]", 50051)
