"""A coordinator, or a store, that wants more of a volunteer's machine than training: it gets nothing.

The worker writes below its cache alone, reads no file that it did not make for a checkpoint, follows no redirect, and
runs nothing that it was sent.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.cache import ContentCache
from cbtm_common.errors import CbtmError, IntegrityError, InvalidArgument, PermissionDenied
from cbtm_common.recipe import Recipe
from cbtm_common.shards import read_shard, write_shard
from cbtm_common.transfer import Transfer
from cbtm_worker import loop as loop_module
from cbtm_worker.config import WorkerConfig
from cbtm_worker.display import Display
from cbtm_worker.heartbeat import Heartbeat
from cbtm_worker.identity import take_slot
from cbtm_worker.inputs import Inputs, check_model
from cbtm_worker.loop import Worker
from cbtm_worker.sender import Sender
from cbtm_worker.session import Held, Session
from tests.support.scripted_coordinator import ONE_ATTEMPT, POLICY, ScriptedCoordinator, file_of, lease_of

pytestmark = pytest.mark.integration

HELD = Held(lease_id="lease_1", epoch=1)
WEIGHTS = save({"weight": np.ones(3, np.float32)})
OUTSIDE = ["../../outside", "/tmp/outside", "..", "a/../../outside", "a\\outside", "C:outside", "outside\0"]


class Victim:
    """A volunteer's machine: a cache folder, and beside it a file that is nobody's business."""

    def __init__(self, folder: Path, coordinator: ScriptedCoordinator) -> None:
        self.folder = folder
        self.cache_dir = folder / "home" / "cache"
        self.task = self.cache_dir / "task_1"
        self.task.mkdir(parents=True)
        self.secret = folder / "home" / "secret.json"
        self.secret.write_bytes(b'{"key": "of this machine"}')
        self.coordinator = coordinator
        self.connection = coordinator.connect()
        self.session = Session(self.connection)
        self.transfer = coordinator.transfer()
        self.cache = ContentCache(self.cache_dir / "files")
        self.heartbeat = Heartbeat(self.session, HELD, POLICY)

    def close(self) -> None:
        self.cache.close()
        self.transfer.close()
        self.connection.close()

    def fetch(self, **fields: Any) -> None:
        inputs = Inputs(
            self.session,
            HELD,
            self.heartbeat,
            self.cache,
            self.transfer,
            cancelled=threading.Event(),
            on_bytes=lambda count: None,
            say=lambda message: None,
        )
        inputs.fetch(ws.TaskSpec(task=pb.Task(id="task_1", total_steps=9), policy=POLICY, **fields), self.task, None)

    def check_untouched(self) -> None:
        """Nothing new lies outside the cache, and the secret is where it was and was not sent."""
        found = {path for path in self.folder.rglob("*") if path.is_file()}
        assert {path for path in found if not path.is_relative_to(self.cache_dir)} == {self.secret}
        assert self.secret.read_bytes() == b'{"key": "of this machine"}'
        assert self.secret.read_bytes() not in self.coordinator.objects.values()


@pytest.fixture
def coordinator() -> Iterator[ScriptedCoordinator]:
    with ScriptedCoordinator() as made:
        yield made


@pytest.fixture
def victim(tmp_path: Path, coordinator: ScriptedCoordinator) -> Iterator[Victim]:
    made = Victim(tmp_path, coordinator)
    yield made
    made.check_untouched()
    made.close()


# Path tricks


@pytest.mark.parametrize("path", OUTSIDE)
def test_a_model_file_with_a_path_out_of_its_folder_is_refused(victim: Victim, path: str) -> None:
    victim.coordinator.objects["base/x"] = b"{}"
    file = file_of("base/x", b"{}")
    file.path = f"{path}/x.json"
    with pytest.raises(InvalidArgument, match="path"):
        victim.fetch(base_model_files=[file])


@pytest.mark.parametrize("digest", [*OUTSIDE, "", "0" * 63, "A" * 64, "0" * 64 + "\n"])
def test_a_digest_that_is_a_path_is_refused(victim: Victim, digest: str) -> None:
    victim.coordinator.objects["base/x"] = b"{}"
    file = file_of("base/x", b"{}")
    file.path, file.sha256 = "config.json", digest
    with pytest.raises(InvalidArgument, match="sha256"):
        victim.fetch(base_model_files=[file])


@pytest.mark.parametrize("task_id", ["../../../..", "..", "", "a/b", "/", "task\n"])
def test_a_task_named_after_somebody_elses_folder_is_not_taken(
    victim: Victim, task_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker makes and removes a folder for each task, by its id."""
    monkeypatch.setattr(loop_module, "describe", lambda device, folder: pb.Hardware())
    answer = lease_of("task_1", recipe_json=Recipe().to_json())
    answer.spec.task.id = task_id
    victim.coordinator.leases.append(answer)
    config = WorkerConfig(coordinator="x:1", cache_dir=victim.cache_dir, name="me", token="t", until_idle=True)
    slot = take_slot(victim.cache_dir, "x:1")
    display = Display(Console(file=io.StringIO()))
    event = threading.Event()
    try:
        with pytest.raises(InvalidArgument, match=r"task\.id"):
            Worker(config, event, display, slot, victim.connection, victim.transfer, victim.cache, "cpu").run()
    finally:
        slot.release()
    assert victim.cache_dir.is_dir()


def test_a_file_that_is_no_part_of_the_checkpoint_is_not_uploaded(victim: Victim) -> None:
    checkpoint = victim.task / "s0000000003"
    checkpoint.mkdir()
    (checkpoint / "state.json").write_bytes(b"{}")
    secret = victim.secret.read_bytes()
    asked = file_of("state.json", secret)
    asked.path = "../../../secret.json"
    answer = ws.PrepareUploadResponse(
        uploads=[pb.Upload(file=asked, request=pb.SignedRequest(method="PUT", url="/stolen"))]
    )
    sender = Sender(victim.session, HELD, victim.heartbeat, victim.transfer)
    victim.coordinator.answers["PrepareUpload"] = answer
    with pytest.raises(PermissionDenied, match="secret"):
        sender.send(checkpoint, step=3, metrics={}, cancelled=threading.Event(), is_needless=lambda: False)
    assert victim.coordinator.puts == []


# Hostile content


class Executed:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (pytest.fail, ("a file from the coordinator was executed",))


def header(fields: Any, payload: bytes = b"") -> bytes:
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + payload


_HOSTILE = {
    "a header of an exabyte": struct.pack("<Q", 1 << 60) + b"{}",
    "a pickle": pickle.dumps(Executed()),
    "tensors that overlap": header(
        {name: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for name in "ab"}, bytes(4)
    ),
    "brackets": struct.pack("<Q", 50_000) + b"[" * 50_000,
    "nothing": b"\0",
}


def _given(files: list[pb.FileSpec], place: str) -> dict[str, Any]:
    """A task that begins with these files."""
    return {"base_model_files": files} if place == "base" else {"resume_from": pb.Checkpoint(files=files)}


@pytest.mark.parametrize("kind", _HOSTILE)
@pytest.mark.parametrize("place", ["base", "resume"])
def test_weights_that_are_none_are_refused_before_a_library_reads_them(victim: Victim, kind: str, place: str) -> None:
    data = _HOSTILE[kind]
    name = "model.safetensors" if place == "base" else "optimizer.safetensors"
    victim.coordinator.objects[f"base/{name}"] = data
    files = [file_of(f"base/{name}", data)]
    with pytest.raises(IntegrityError, match="safetensors"):
        victim.fetch(
            **({"base_model_files": files} if place == "base" else {"resume_from": pb.Checkpoint(files=files)})
        )


@pytest.mark.parametrize("kind", _HOSTILE)
def test_a_hostile_shard_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    path.write_bytes(_HOSTILE[kind])
    with pytest.raises(IntegrityError):
        read_shard(path)


@pytest.mark.parametrize("offsets", [[0, 2**63 - 1, -2], [0, -1], [0, 2**62], [2**63 - 1]])
def test_a_shard_whose_documents_lie_elsewhere_is_refused(offsets: list[int], tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    write_shard(path, np.array([5, 0, 6, 0]), np.array(offsets), vocab_size=10, eos_token_id=0)
    with pytest.raises(IntegrityError):
        read_shard(path)


@pytest.mark.parametrize("field", ["auto_map", "trust_remote_code"])
@pytest.mark.parametrize("place", ["base", "resume"])
def test_a_config_that_names_code_is_refused(victim: Victim, field: str, place: str) -> None:
    data = json.dumps({"model_type": "llama", field: {"AutoModelForCausalLM": "evil.Model"}}).encode()
    victim.coordinator.objects["base/config.json"] = data
    file = file_of("base/config.json", data)
    file.path = "config.json" if place == "base" else "model/config.json"
    with pytest.raises(InvalidArgument, match="never runs code"):
        victim.fetch(
            **({"base_model_files": [file]} if place == "base" else {"resume_from": pb.Checkpoint(files=[file])})
        )


@pytest.mark.parametrize("data", [b"[" * 100_000, b'{"a": 1, "a": 2}', b'{"a": NaN}', b"\xff"])
def test_a_config_that_is_no_json_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(IntegrityError, match="JSON"):
        check_model(tmp_path)


# A hostile store, over real HTTP


class Server:
    """Answers every request with what `answer` says; `seen` are the requests that came."""

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], None]) -> None:
        seen: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                seen.append(f"{self.command} {self.path}")
                answer(self)

            do_GET = do_PUT = do_DELETE = do_POST = handle_any  # noqa: N815  (names of the base class)

            def log_message(self, format: str, *args: Any) -> None: ...

        self.seen = seen
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def serve() -> Iterator[Callable[[Callable[[BaseHTTPRequestHandler], None]], Server]]:
    servers: list[Server] = []

    def make(answer: Callable[[BaseHTTPRequestHandler], None]) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


Serve = Callable[[Callable[[BaseHTTPRequestHandler], None]], Server]


def _empty(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("content-length", "0")
    handler.end_headers()


def _redirect(target: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(307)
        handler.send_header("location", target)
        handler.send_header("content-length", "0")
        handler.end_headers()

    return answer


def _endless(handler: BaseHTTPRequestHandler) -> None:
    """More than was announced: 16 MiB, if the client takes them."""
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(256):
            handler.wfile.write(bytes(1 << 16))
    except OSError:
        return


def test_a_redirect_to_another_host_is_not_followed(serve: Serve, tmp_path: Path) -> None:
    internal = serve(_empty)
    store = serve(_redirect(f"{internal.url}/latest/meta-data"))
    (tmp_path / "mine").write_bytes(b"{}")
    file = file_of("x", b"{}")
    get, put = (pb.SignedRequest(method=method, url=f"{store.url}/x") for method in ("GET", "PUT"))
    with Transfer(policy=ONE_ATTEMPT) as transfer:
        with pytest.raises(PermissionDenied, match="redirected"):
            transfer.download(pb.Download(file=file, request=get), tmp_path / "got")
        with pytest.raises(PermissionDenied, match="redirected"):
            transfer.upload(pb.Upload(file=file, request=put), tmp_path / "mine")
    assert store.seen
    assert internal.seen == []


@pytest.mark.parametrize("method", ["DELETE", "POST", "PUT", "", "get"])
def test_a_download_makes_no_other_request_than_a_get(serve: Serve, tmp_path: Path, method: str) -> None:
    internal = serve(_empty)
    request = pb.SignedRequest(method=method, url=f"{internal.url}/everything")
    with Transfer(policy=ONE_ATTEMPT) as transfer, pytest.raises(InvalidArgument, match="method"):
        transfer.download(pb.Download(file=file_of("x", b"{}"), request=request), tmp_path / "got")
    assert internal.seen == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://x", "//x"])
def test_a_url_that_is_not_http_is_refused(tmp_path: Path, url: str) -> None:
    request = pb.SignedRequest(method="GET", url=url)
    with Transfer(policy=ONE_ATTEMPT) as transfer, pytest.raises(CbtmError):
        transfer.download(pb.Download(file=file_of("x", b"{}"), request=request), tmp_path / "got")
    assert not (tmp_path / "got").exists()


def test_a_store_that_never_ends_fills_no_disk(serve: Serve, tmp_path: Path) -> None:
    store = serve(_endless)
    request = pb.SignedRequest(method="GET", url=f"{store.url}/x")
    with Transfer(policy=ONE_ATTEMPT) as transfer, pytest.raises(IntegrityError, match="sends more"):
        transfer.download(pb.Download(file=file_of("x", bytes(1000)), request=request), tmp_path / "got")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1000
