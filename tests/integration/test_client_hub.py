"""An ensemble to and from a repository, over HTTP: huggingface_hub is the client, a small server stands for the Hub."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.support.ensembles import make_parts

pytestmark = pytest.mark.integration

COMMIT = "0" * 39 + "1"
REPO = "lab/web"


class Hub(ThreadingHTTPServer):
    """One repository of plain and LFS files: what `create_repo`, `upload_folder` and `snapshot_download` ask for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, value: Any, headers: dict[str, str] | None = None, *, code: int = 200) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self._body()
        if path == "/api/repos/create":
            self._answer({"url": f"{self.server.url}/{REPO}", "name": REPO, "id": "1"})
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self._answer({"files": [{**f, "uploadMode": self._mode(f["path"]), "shouldIgnore": False} for f in files]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = [self._lfs(o) for o in json.loads(body)["objects"]]
            self._answer({"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})
        elif path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.blobs[value["oid"]]
            self._answer({"commitUrl": f"{self.server.url}/{REPO}/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._answer({"error": path}, code=404)

    def do_PUT(self) -> None:
        data = self._body()
        self.server.blobs[hashlib.sha256(data).hexdigest()] = data
        self._answer(b"", {"ETag": '"x"'})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        prefix = f"/{REPO}/resolve/{COMMIT}/"
        name = path.removeprefix(prefix)
        if path.startswith(f"/api/models/{REPO}/tree/"):
            self._answer([self._entry(name, data) for name, data in self.server.files.items()])
        elif path.startswith(f"/api/models/{REPO}"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self._answer({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings, "tags": []})
        elif path.startswith(prefix) and name in self.server.files:
            data = self.server.files[name]
            etag = hashlib.sha256(data).hexdigest()
            self._answer(data, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})
        else:
            missing = "EntryNotFound" if path.startswith(prefix) else "RepoNotFound"
            self._answer({"error": path}, {"X-Error-Code": missing}, code=404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def _mode(self, path: str) -> str:
        return "lfs" if path.endswith(".safetensors") else "regular"

    def _lfs(self, blob: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.server.url}/blob/{blob['oid']}"
        return {"oid": blob["oid"], "size": blob["size"], "actions": {"upload": {"href": href}}}

    def _entry(self, name: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run(hub: Hub, home: Path, code: str) -> str:
    """In a process of its own, as the endpoint is read at import."""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "*", "HF_TOKEN": "hf_test"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_pushed_and_pulled_it_is_the_same_and_each_expert_loads_alone(hub: Hub, tmp_path: Path) -> None:
    from cbtm._ensemble import Ensemble
    from cbtm._residency import Placement

    parts = make_parts(tmp_path / "parts", experts=3)
    Ensemble._of(parts, Placement(), top_k=2, temperature=None).save(tmp_path / "saved")
    shown = "print(model(torch.tensor([[0, 5, 6, 7]])).logits.double().sum().item(), model.ensemble.routing)"
    pushed = run(
        hub,
        tmp_path / "home",
        f"import cbtm, torch; model = cbtm.CbtmForCausalLM.from_pretrained({str(tmp_path / 'saved')!r})\n"
        f"model.set_routing(weights=[1.0, 2.0, 0.0]); model.push_to_hub({REPO!r})\n{shown}",
    )
    assert {"cbtm.json", "config.json", "tokenizer.json", "router/router.json", "modeling_cbtm.py"} < set(hub.files)
    for index in range(3):
        assert f"experts/{index:04d}/model.safetensors" in hub.files
    pulled = run(
        hub,
        tmp_path / "other-home",
        "import cbtm, torch; from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({REPO!r})\n"
        f"alone = AutoModelForCausalLM.from_pretrained({REPO!r}, subfolder='experts/0001')\n"
        "assert type(alone).__name__ == 'LlamaForCausalLM', type(alone)\n"
        f"{shown}",
    )
    assert pulled == pushed
    assert "FIXED" in pulled
    missing = run(
        hub,
        tmp_path / "other-home",
        "import cbtm\ntry: cbtm.CbtmForCausalLM.from_pretrained('lab/nothing')\n"
        "except cbtm.NotFound as error: print(error)",
    )
    assert missing.startswith("lab/nothing: no folder with a cbtm.json, and no repository")
