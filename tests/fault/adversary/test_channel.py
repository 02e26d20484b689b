"""Attacks on the channel: impostors, plain text, tokens without their fingerprint. Each fails without its defence."""

from __future__ import annotations

import contextlib
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import CbtmError, IntegrityError, InvalidArgument, Unavailable
from cbtm_common.ids import new_secret
from cbtm_common.rpc import Connection, RetryPolicy, connect
from cbtm_common.security import Security, join_token, split_token
from cbtm_coordinator.config import CoordinatorConfig
from cbtm_coordinator.tls import Authority, Certificates
from tests.support.coordinator import RunningCoordinator
from tests.support.raw_run import RawWorker

pytestmark = pytest.mark.integration


class Impostor:
    """A coordinator's port with another's certificates, that notes what is asked of it."""

    def __init__(self, data_dir: Path, *, port: int = 0) -> None:
        self.asked: list[str] = []
        data_dir.mkdir(exist_ok=True)
        self.certificates = Certificates(CoordinatorConfig(data_dir=data_dir))
        self._server = grpc.server(ThreadPoolExecutor(2), handlers=[_Noting(self.asked)])
        self.port = self._server.add_secure_port(f"127.0.0.1:{port}", self.certificates.grpc_credentials())

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> Impostor:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(0).wait()


class _Noting(grpc.GenericRpcHandler):  # type: ignore[misc]  # untyped in the stubs
    def __init__(self, asked: list[str]) -> None:
        self._asked = asked

    def service(self, details: Any) -> Any:
        self._asked.append(details.method)
        return None


def _ask(connection: Connection) -> None:
    connection.worker.Probe(ws.ProbeRequest())


def test_another_certificate_under_the_coordinator_s_name_is_told_nothing(
    coordinator: RunningCoordinator, tmp_path: Path
) -> None:
    token = coordinator.token("join")
    with Impostor(tmp_path / "impostor") as impostor, connect(impostor.target, token=token, attempts=1) as connection:
        with pytest.raises(IntegrityError, match="ask the run's owner for a new token"):
            _ask(connection)
        with pytest.raises(IntegrityError):
            connection.http_context()
        assert not impostor.asked


def test_who_shows_the_true_authority_without_being_certified_by_it_is_told_nothing(
    coordinator: RunningCoordinator, tmp_path: Path
) -> None:
    """The authority's certificate is public: anybody may append it to a chain of his own."""
    with Impostor(tmp_path / "impostor") as prepared:
        served = prepared.certificates.current()
    server_pem = tmp_path / "impostor" / "tls" / "server.pem"
    server_pem.write_bytes(served.chain + (coordinator.data_dir / "tls" / "ca.pem").read_bytes())
    with (
        Impostor(tmp_path / "impostor") as impostor,
        connect(impostor.target, token=coordinator.token("join"), attempts=1) as connection,
    ):
        with pytest.raises(IntegrityError, match="not trusted"):
            _ask(connection)
        assert not impostor.asked


def test_an_impostor_that_comes_between_later_is_told_nothing(tmp_path: Path) -> None:
    """It takes the address over while the client holds an open connection object."""
    shutil.rmtree(tmp_path / "true", ignore_errors=True)
    with Impostor(tmp_path / "true") as true:
        port = true.port
        token = join_token(new_secret("worker"), true.certificates.fingerprint)
        connection = connect(true.target, token=token, attempts=1)
        with pytest.raises(CbtmError):
            _ask(connection)
        assert true.asked
    with connection, Impostor(tmp_path / "impostor", port=port) as impostor:
        with pytest.raises(Unavailable):
            _ask(connection)
        assert not impostor.asked


def test_objects_are_neither_sent_nor_fetched_past_another_certificate(
    coordinator: RunningCoordinator, worker: RawWorker, tmp_path: Path
) -> None:
    (tmp_path / "impostor").mkdir()
    context = Certificates(CoordinatorConfig(data_dir=tmp_path / "impostor")).http_context()
    got: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                link, _ = listener.accept()
                with link, context.wrap_socket(link, server_side=True) as wrapped:
                    got.append(wrapped.recv(1000))

        server = threading.Thread(target=serve)
        server.start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/v1/objects/x"
        with pytest.raises(httpx.ConnectError), httpx.Client(verify=worker.connection.http_context()) as client:
            client.get(url)
        server.join(20)
    assert not got


def test_plain_text_is_for_loopback_or_said_twice_on_both_sides(coordinator: RunningCoordinator) -> None:
    for host in ("192.0.2.7", "example.org", "0.0.0.0"):
        with pytest.raises(InvalidArgument, match="plain text"):
            connect(f"{host}:50051", security=Security(insecure=1))
        connect(f"{host}:50051", security=Security(insecure=2)).close()
    served = coordinator.coord("serve", "--host", "0.0.0.0", "--port", "0", "--http-port", "0", "--insecure")
    assert served.returncode == 2
    assert "plain text" in served.stderr
    # Nor does one that is served with TLS take plain text.
    with connect(coordinator.target, security=Security(insecure=1), attempts=1) as plain, pytest.raises(Unavailable):
        _ask(plain)


def test_a_token_whose_fingerprint_was_cut_is_refused_before_anything_is_sent(coordinator: RunningCoordinator) -> None:
    for cut in (coordinator.token("join")[:-1], coordinator.token("join")[:-43]):
        with pytest.raises(InvalidArgument, match="cut short") as caught:
            connect(coordinator.target, token=cut)
        assert cut not in caught.value.message


def test_a_token_without_its_fingerprint_is_refused_at_once(
    coordinator: RunningCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not tried again: nothing that passes with time is wrong."""
    waits: list[int] = []
    monkeypatch.setattr(RetryPolicy, "delay", lambda self, attempt, chance: waits.append(attempt) or 0.0)
    secret = split_token(coordinator.token("join"))[0]
    with (
        connect(coordinator.target, token=secret) as connection,
        pytest.raises(IntegrityError, match=r"not trusted.*fingerprint \(as it was handed out"),
    ):
        _ask(connection)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_answer_in_plain_text, args=(listener, 2), daemon=True).start()
        target = f"127.0.0.1:{listener.getsockname()[1]}"
        for token in (secret, coordinator.token("join")):
            with connect(target, token=token) as connection, pytest.raises(InvalidArgument, match="not answer in TLS"):
                _ask(connection)
    assert waits == []


def _answer_in_plain_text(listener: socket.socket, count: int) -> None:
    for _ in range(count):
        link, _ = listener.accept()
        with link, contextlib.suppress(ConnectionError):
            link.recv(1000)
            link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            while link.recv(1000):
                pass


def test_the_certificate_is_renewed_under_the_same_authority_before_it_ends(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    config = CoordinatorConfig(data_dir=tmp_path)
    certificates = Certificates(config, clock=lambda: now)
    first = certificates.current()
    now += timedelta(days=59)
    assert certificates.current() is first
    now += timedelta(days=2)
    second = certificates.current()
    assert second.not_after > first.not_after
    # A process beside it, and the next one, serve the same.
    assert Authority(config, clock=lambda: now).server_certificate().chain == second.chain
    assert Certificates(config, clock=lambda: now).fingerprint == certificates.fingerprint
