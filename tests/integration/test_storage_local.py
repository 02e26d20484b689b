"""The embedded store through its real HTTP endpoint: the contract, and what is special to it."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from cbtm_common.errors import NotFound, ResourceExhausted, Unavailable
from cbtm_common.rpc import RetryPolicy
from cbtm_common.transfer import Transfer
from cbtm_coordinator.storage import LocalStore, Signed, UrlSigner, prepare_download, prepare_upload, verify
from cbtm_coordinator.storage.base import CHUNK
from cbtm_coordinator.storage.http_app import make_app
from cbtm_coordinator.storage.local import Incoming
from tests.support.asgi import serve
from tests.support.object_contract import ObjectStoreContract
from tests.support.objects import IMPATIENT, PART, TTL, Backend, make_file

pytestmark = pytest.mark.integration

STALL_SECONDS = 0.5


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store", UrlSigner(b"k" * 32))


@pytest.fixture
def backend(store: LocalStore) -> Iterator[Backend]:
    with serve(make_app(store, stall_seconds=STALL_SECONDS)) as port:
        yield Backend(store=store, base_url=f"http://127.0.0.1:{port}", port=port, store_through=lambda _: store)


class TestLocalStore(ObjectStoreContract):
    pass


def raw(port: int, method: str, target: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """A request whose target nobody normalises."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, target, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def put_of(store: LocalStore, key: str, content: bytes) -> Signed:
    return store.sign_put(key, size=len(content), sha256=hashlib.sha256(content).hexdigest(), ttl=TTL)


def test_the_health_check_answers(backend: Backend) -> None:
    assert raw(backend.port, "GET", "/healthz") == (200, b'{"status":"ok"}')


def test_a_draining_server_is_not_healthy(store: LocalStore) -> None:
    with serve(make_app(store, healthy=lambda: False)) as port:
        assert raw(port, "GET", "/healthz")[0] == 503


@pytest.mark.parametrize(
    "trick",
    [
        "/v1/objects/../../../etc/passwd",
        "/v1/objects/%2e%2e/%2e%2e/etc/passwd",
        "/v1/objects/runs%2Fr%2Fx",
        "/v1/objects/runs/r/%78",
        "/v1/objects/runs/r//x",
        "/v1/objects/runs/r/x%00",
        "/v1/objects/runs/r/x/",
        "/v1/objects//etc/passwd",
        "/v1/objects/runs/r/..%5cx",
        "/v1/objects/%ff%fe",
    ],
)
def test_paths_in_another_spelling_are_refused_even_with_a_signature(
    backend: Backend, store: LocalStore, trick: str
) -> None:
    store.put_bytes("runs/r/x", b"secret")
    query = store.sign_get("runs/r/x", ttl=TTL).url.partition("?")[2]
    status, body = raw(backend.port, "GET", f"{trick}?{query}")
    assert status in (400, 403, 404)
    assert b"secret" not in body


def test_errors_are_small_json_objects(backend: Backend, store: LocalStore) -> None:
    status, body = raw(backend.port, "GET", store.sign_get("runs/none", ttl=TTL).url)
    assert (status, json.loads(body)["reason"]) == (404, "NOT_FOUND")
    status, body = raw(backend.port, "GET", "/v1/objects/runs/none")
    assert (status, json.loads(body)["reason"]) == (401, "UNAUTHENTICATED")
    signed = put_of(store, "runs/x", b"right")
    assert raw(backend.port, "PUT", signed.url, {"content-length": "6"})[0] == 413
    store.put_bytes("runs/x", b"other")
    response = backend.send(signed, b"right")
    assert (response.status_code, response.json()["reason"]) == (409, "ALREADY_EXISTS")


def test_a_symbolic_link_out_of_the_folder_is_not_followed(backend: Backend, store: LocalStore, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("secret")
    store.put_bytes("runs/r/x", b"x")
    (store.folder / "objects" / "runs" / "link").symlink_to(tmp_path / "outside")
    (store.folder / "objects" / "runs" / "file").symlink_to(tmp_path / "outside" / "file")
    for key in ("runs/link/file", "runs/file"):
        status, body = raw(backend.port, "GET", store.sign_get(key, ttl=TTL).url)
        assert status == 400
        assert b"secret" not in body
    assert backend.send(put_of(store, "runs/link/new", b"new"), b"new").status_code == 400
    assert not (tmp_path / "outside" / "new").exists()
    assert [o.key for o in store.list("runs/")] == ["runs/r/x"]


@pytest.mark.parametrize(
    ("header", "status", "content"),
    [
        ("bytes=2-4", 206, b"234"),
        ("bytes=7-", 206, b"789"),
        ("bytes=-3", 206, b"789"),
        ("bytes=-30", 206, b"0123456789"),
        ("bytes=5-100", 206, b"56789"),
        ("bytes=10-", 416, b""),
        ("bytes=5-2", 200, b"0123456789"),
        ("bytes=0-1,3-4", 200, b"0123456789"),
        ("lines=0-1", 200, b"0123456789"),
    ],
)
def test_ranges(backend: Backend, store: LocalStore, header: str, status: int, content: bytes) -> None:
    store.put_bytes("runs/r", b"0123456789")
    assert raw(backend.port, "GET", store.sign_get("runs/r", ttl=TTL).url, {"range": header}) == (status, content)


def test_head_tells_the_length_and_sends_nothing(backend: Backend, store: LocalStore) -> None:
    store.put_bytes("runs/r", b"0123456789")
    response = backend.send(store.sign_get("runs/r", ttl=TTL), method="HEAD")
    assert (response.status_code, response.headers["content-length"], response.content) == (200, "10", b"")
    assert response.headers["etag"] == f'"{hashlib.sha256(b"0123456789").hexdigest()}"'


def test_a_sender_that_stalls_is_cut_off_and_leaves_nothing(backend: Backend, store: LocalStore) -> None:
    signed = put_of(store, "runs/slow", b"x" * 1000)
    with socket.create_connection(("127.0.0.1", backend.port), timeout=10) as link:
        link.sendall(f"PUT {signed.url} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n".encode() + b"x" * 10)
        assert link.recv(100).startswith(b"HTTP/1.1 408")
        while link.recv(100):
            pass
    assert store.stat("runs/slow") is None
    assert list((store.folder / "incoming").iterdir()) == []


def test_a_reader_that_stalls_is_cut_off(backend: Backend, store: LocalStore) -> None:
    store.put_bytes("runs/large", b"x" * (64 << 20))
    url = store.sign_get("runs/large", ttl=TTL).url
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.settimeout(20)
        link.connect(("127.0.0.1", backend.port))
        link.sendall(f"GET {url} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        # Nothing is read until the server has given up: then little more than its buffers is left.
        threading.Event().wait(STALL_SECONDS * 4)
        received = 0
        while chunk := link.recv(1 << 20):
            received += len(chunk)
    assert received < 64 << 20


def incoming(store: LocalStore) -> list[Path]:
    return list((store.folder / "incoming").iterdir())


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to be"
        threading.Event().wait(0.01)


def test_a_body_cut_off_in_the_middle_leaves_nothing(backend: Backend, store: LocalStore) -> None:
    # Larger than what is received in memory.
    size = CHUNK + 1
    signed = put_of(store, "runs/cut", b"x" * size)
    with socket.create_connection(("127.0.0.1", backend.port), timeout=10) as link:
        link.sendall(f"PUT {signed.url} HTTP/1.1\r\nHost: x\r\nContent-Length: {size}\r\n\r\n".encode() + b"x" * 10)
        until(lambda: len(incoming(store)) == 1)
        link.shutdown(socket.SHUT_WR)
        while link.recv(1000):
            pass
    # The server closes the link before its handler hears of it.
    until(lambda: not incoming(store))
    assert store.stat("runs/cut") is None
    assert incoming(store) == []


def test_a_full_disk_is_told_and_leaves_nothing(
    backend: Backend, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_file(tmp_path / "file", 3 << 20)
    upload = prepare_upload(store, file, ttl=TTL)

    class OnFullDisk(Incoming):
        def __init__(self, path: Path, size: int) -> None:
            super().__init__(path, size)
            # The device on which every write fails with ENOSPC.
            os.dup2(os.open("/dev/full", os.O_WRONLY), self._file.fileno())

    monkeypatch.setattr("cbtm_coordinator.storage.local.Incoming", OnFullDisk)
    with Transfer(base_url=backend.base_url, policy=IMPATIENT) as transfer:
        with pytest.raises(ResourceExhausted, match="full"):
            transfer.upload(upload, tmp_path / "file")
        assert list((store.folder / "incoming").iterdir()) == []
        monkeypatch.undo()
        transfer.upload(upload, tmp_path / "file")
    verify(store, file)


def test_a_body_that_cannot_fit_is_refused_before_it_comes(backend: Backend, store: LocalStore) -> None:
    signed = store.sign_put("runs/huge", size=1 << 50, sha256="0" * 64, ttl=TTL)
    with socket.create_connection(("127.0.0.1", backend.port), timeout=10) as link:
        link.sendall(f"PUT {signed.url} HTTP/1.1\r\nHost: x\r\nContent-Length: {1 << 50}\r\n\r\n".encode())
        assert link.recv(100).startswith(b"HTTP/1.1 507")


def test_an_upload_goes_on_after_the_server_was_replaced(store: LocalStore, tmp_path: Path) -> None:
    file = make_file(tmp_path / "file", 2 * PART)
    with serve(make_app(store)) as port, Transfer(base_url=f"http://127.0.0.1:{port}") as transfer:
        upload = prepare_upload(store, file, ttl=TTL, part_size=PART)
        del upload.multipart.parts[1:]
        transfer.upload(upload, tmp_path / "file")
    reopened = LocalStore(store.folder, UrlSigner(b"k" * 32))
    assert [p.part_number for p in prepare_upload(reopened, file, ttl=TTL, part_size=PART).multipart.parts] == [2]


def test_a_server_killed_while_it_writes_leaves_no_half_object(tmp_path: Path) -> None:
    """Killed with the bytes in a temporary file, and killed with the object there and no answer sent."""
    for point, there in (("before_rename", False), ("after_rename", True)):
        folder = tmp_path / point
        script = (
            "import sys; from pathlib import Path;"
            "from cbtm_coordinator.storage import LocalStore, UrlSigner;"
            "from cbtm_coordinator.storage.signing import Grant;"
            "store = LocalStore(Path(sys.argv[1]), UrlSigner(b'k' * 32));"
            "incoming = store.receive(5); incoming.write(b'right');"
            "store.accept(incoming, Grant(method='PUT', key='runs/x', size=5, sha256=sys.argv[2]))"
        )
        digest = hashlib.sha256(b"right").hexdigest()
        environment = {**os.environ, "CBTM_FAULTS": f"storage.put.{point}=kill"}
        command = [sys.executable, "-c", script, str(folder), digest]
        assert subprocess.run(command, env=environment, check=False).returncode == -9
        store = LocalStore(folder, UrlSigner(b"k" * 32))
        stat = store.stat("runs/x")
        assert (stat is not None and stat.sha256 == digest) == there
        if not there:
            with pytest.raises(NotFound):
                store.path_of("runs/x")


def test_public_urls_are_absolute(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, UrlSigner(b"k" * 32, public_url="https://cbtm.example/store/"))
    file = make_file(tmp_path / "file", 10)
    url = prepare_download(store, file, ttl=timedelta(minutes=1)).request.url
    assert url.startswith("https://cbtm.example/store/v1/objects/runs/")


def test_a_server_that_neither_reads_nor_answers_is_given_up(store: LocalStore, tmp_path: Path) -> None:
    """More than the buffers of the link hold, to a peer that accepts and then does nothing."""
    file = make_file(tmp_path / "file", 16 << 20)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        policy = RetryPolicy(attempts=2, initial=0.01, maximum=0.01)
        base_url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        with Transfer(base_url=base_url, timeout=0.3, policy=policy) as transfer:
            with pytest.raises(Unavailable, match="WriteTimeout"):
                transfer.upload(prepare_upload(store, file, ttl=TTL), tmp_path / "file")
            with pytest.raises(Unavailable, match="ReadTimeout"):
                transfer.download(prepare_download(store, file, ttl=TTL), tmp_path / "back")
