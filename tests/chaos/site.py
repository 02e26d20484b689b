"""What the storm rages over: PostgreSQL, an S3 store and two coordinators, each behind a proxy that fails, six workers.

The registry is made once, with a run that nobody has worked on; its copies, each with a copy of its objects, are where
the calm run and the storm begin.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_common.ids import new_request_id
from cbtm_common.rpc import Connection, connect
from tests.chaos import checks
from tests.support.postgres import PostgresServer
from tests.support.proxy import FaultProxy
from tests.support.run_fixture import MODEL, _free_port, write_corpus, zygote
from tests.support.seaweed import Seaweed
from tests.support.zygote import HASTE_VARIABLE, THROTTLE_VARIABLE, Child

RUN = "storm"
BUCKET = "chaos"
COORDINATORS = 2
WORKERS = 6
CLUSTERS = 4
LEASE_SECONDS = 3.0
STEP_SECONDS = 0.05
# Orphans are collected when they are so old, in seconds.
GRACE_SECONDS = 6.0
# Who is asked to leave has left by then: coordinators and the store answer, so there is nothing to wait for.
LEAVE_SECONDS = 30.0
RECIPE = f"""
sequence_length = 32
global_batch = 2
steps = 60
seed = 11
precision = "fp32"
dropout = 0.1
held_out_fraction = 0.1

[optimizer]
learning_rate = 3e-3

[schedule]
warmup_steps = 4

[seed_phase]
fraction = 0.1

[lease]
lease_seconds = {LEASE_SECONDS}
renew_seconds = 0.5
checkpoint_seconds = 1
max_attempts = 50
"""


class Parts:
    """The servers, and registries made on them."""

    def __init__(self, postgres: PostgresServer, seaweed: Seaweed, store_proxy: FaultProxy, folder: Path) -> None:
        self.postgres = postgres
        self.seaweed = seaweed
        self.store_proxy = store_proxy
        self.folder = folder
        seaweed.make_bucket(BUCKET)
        self._make_template()

    def _make_template(self) -> None:
        """The registry `template`: a run that has started, untouched."""
        self._sql("CREATE DATABASE template_run")
        with Site(self, "template_run") as site:
            init = site.coord("init", "--data-dir", str(site.data))
            assert init.wait(60) == 0, init.output
            site.start_coordinators()
            corpus = write_corpus(self.folder / "corpus.jsonl")
            (self.folder / "recipe.toml").write_text(RECIPE)
            (self.folder / "model.json").write_text(json.dumps(MODEL))
            made = site.coord(
                *("run", "create", "--coordinator", site.target, "--token", site.token("admin"), "--name", RUN),
                *("--corpus", str(corpus), "--id-field", "id", "--clusters", str(CLUSTERS)),
                *("--from-scratch", str(self.folder / "model.json"), "--recipe", str(self.folder / "recipe.toml")),
            )
            assert made.wait(180) == 0, made.output
            site.stop()

    def copy(self, name: str) -> Site:
        """A site of its own that begins where the template stands."""
        # FILE_COPY, for it takes a checkpoint: what a sequence has logged ahead does not come along with WAL_LOG, and a
        # crash before the next checkpoint would give out the same numbers again.
        self._sql(f"CREATE DATABASE {name} TEMPLATE template_run STRATEGY FILE_COPY")
        client = self.seaweed.client()
        for key in list_keys(client, "template_run/"):
            source = {"Bucket": BUCKET, "Key": key}
            client.copy_object(Bucket=BUCKET, CopySource=source, Key=name + key.removeprefix("template_run"))
        site = Site(self, name)
        shutil.copytree(self.folder / "template_run" / "data", site.data)
        return site

    def _sql(self, statement: str) -> None:
        with psycopg.connect(self.postgres.url(), autocommit=True) as connection:
            connection.execute(statement)


def list_keys(client: Any, prefix: str) -> list[str]:
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return [item["Key"] for page in pages for item in page.get("Contents", [])]


class Site:
    """Coordinators and workers on one registry. Ends them all on leaving."""

    def __init__(self, parts: Parts, name: str) -> None:
        self.parts = parts
        self.name = name
        self.folder = parts.folder / name
        self.data = self.folder / "data"
        self.coordinators: list[Child] = []
        self.workers: list[Child] = []
        self.children: list[Child] = []
        self._ports = [_free_port() for _ in range(COORDINATORS)]
        self._lives = 0
        self._slots = list(range(WORKERS))
        # Workers reach whichever coordinator answers.
        self.link = FaultProxy(*self._ports, seed=0)
        self.link.__enter__()
        self._connection: Connection | None = None
        self._client = parts.seaweed.client()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.link.port}"

    def token(self, name: str) -> str:
        return (self.data / f"{name}.token").read_text().strip()

    # Processes

    def start_coordinators(self) -> None:
        self.coordinators = [self.start_coordinator(index) for index in range(COORDINATORS)]

    def start_coordinator(self, index: int, *, wait: bool = True) -> Child:
        port = self._ports[index]
        serve = ("serve", "--data-dir", str(self.data), "--host", "127.0.0.1", "--port", str(port))
        child = self._spawn("cbtm-coord", f"coordinator-{index}", *serve, "--log-level", "info")
        if wait:
            with connect(f"127.0.0.1:{port}", token=self.token("join"), attempts=1) as probe:
                assert probe.wait_until_ready(60), child.output
        return child

    def start_workers(self, count: int = WORKERS) -> None:
        self.workers = [self.start_worker(index) for index in range(count)]

    def start_worker(self, index: int, *, new_machine: bool = False) -> Child:
        """Again on the disk that it had, or as another machine."""
        if new_machine:
            shutil.rmtree(self._cache(index), ignore_errors=True)
            self._slots[index] += WORKERS
        join = ("join", "--coordinator", self.target, "--token", self.token("join"), "--device", "cpu")
        cache = ("--threads", "1", "--cache-dir", str(self._cache(index)), "--name", f"worker-{self._slots[index]}")
        return self._spawn("cbtm-worker", f"worker-{index}", *join, *cache, "--log-level", "info")

    def _cache(self, index: int) -> Path:
        return self.folder / f"cache-{self._slots[index]}"

    def coord(self, *arguments: str) -> Child:
        return self._spawn("cbtm-coord", arguments[0], *arguments)

    def _spawn(self, program: str, name: str, *arguments: str) -> Child:
        self._lives += 1
        environment = {
            "CBTM_DATABASE_URL": self.parts.postgres.url(self.name),
            "CBTM_OBJECT_STORE": f"s3://{BUCKET}/{self.name}",
            "CBTM_S3_ENDPOINT_URL": f"http://127.0.0.1:{self.parts.store_proxy.port}",
            "CBTM_REAPER_SECONDS": "0.2",
            "CBTM_ORPHAN_SECONDS": "2",
            "CBTM_ORPHAN_GRACE_SECONDS": str(GRACE_SECONDS),
            "CBTM_THREADS": "16",
            "CBTM_DRAIN_SECONDS": "10",
            HASTE_VARIABLE: "1",
            THROTTLE_VARIABLE: str(STEP_SECONDS),
            **self.parts.seaweed.environment(),
        }
        log = self.folder / "logs" / f"{self._lives:04d}-{name}.log"
        child = zygote().spawn(program, list(arguments), log, environment)
        self.children.append(child)
        return child

    def stop(self) -> list[str]:
        """All are asked to leave, workers first; who does not leave well, with what there is to tell why."""
        return [*_ended(self.workers), *_ended(self.coordinators)]

    def evidence(self) -> str:
        """Of each process that should run: the end of its log, and its stacks."""
        return "\n".join(f"{child.log.name}:\n{child.evidence()}" for child in [*self.workers, *self.coordinators])

    # As the owner

    @property
    def connection(self) -> Connection:
        if self._connection is None:
            self._connection = connect(self.target, token=self.token("admin"), timeout=10, attempts=6)
        return self._connection

    def set_paused(self, paused: bool) -> None:
        admin = self.connection.admin
        if paused:
            admin.PauseRun(ad.PauseRunRequest(request_id=new_request_id(), run=RUN))
        else:
            admin.ResumeRun(ad.ResumeRunRequest(request_id=new_request_id(), run=RUN))

    def requeue(self, cluster_index: int, *, from_start: bool) -> None:
        request = ad.RequeueTaskRequest(
            request_id=new_request_id(), run=RUN, cluster_index=cluster_index, from_start=from_start
        )
        self.connection.admin.RequeueTask(request)

    # From outside

    def rows(self, query: str, *parameters: object) -> list[Mapping[str, Any]]:
        """By a connection of its own. Raises psycopg.Error while the database is away."""
        url = self.parts.postgres.url(self.name)
        with psycopg.connect(url, autocommit=True, row_factory=dict_row, connect_timeout=10) as connection:
            return connection.execute(query, parameters).fetchall()  # type: ignore[arg-type]  # literals all

    def read_object(self, key: str) -> bytes | None:
        from botocore.exceptions import ClientError

        try:
            answer: bytes = self._client.get_object(Bucket=BUCKET, Key=f"{self.name}/{key}")["Body"].read()
        except ClientError as error:
            if error.response["Error"]["Code"] in ("NoSuchKey", "404"):
                return None
            raise
        return answer

    def object_keys(self) -> list[str]:
        prefix = f"{self.name}/"
        return [key.removeprefix(prefix) for key in list_keys(self._client, prefix)]

    def open_uploads(self) -> list[str]:
        prefix = f"{self.name}/"
        found = self._client.list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", [])
        return [upload["Key"].removeprefix(prefix) for upload in found]

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection is not None:
            self._connection.close()
        for child in self.children:
            child.send(signal.SIGCONT)
            child.kill()
        self.link.__exit__(None, None, None)


def _ended(children: Sequence[Child]) -> list[str]:
    """Asks all of them at once; what was wrong with their leaving."""
    for child in children:
        child.send(signal.SIGCONT)
        child.send(signal.SIGTERM)
    end = time.monotonic() + LEAVE_SECONDS
    found = []
    for child in children:
        try:
            code = child.wait(max(0.0, end - time.monotonic()))
        except AssertionError as error:
            found.append(f"{child.log.name} did not leave within {LEAVE_SECONDS:.0f} s: {error}")
        else:
            found += [f"{child.log.name} left with exit code {code}: {child.evidence()}"] if code else []
    return found


@contextlib.contextmanager
def parts(seed: int, *, folder: Path) -> Iterator[Parts]:
    """All servers, started; ended on leaving. `folder` keeps the logs."""
    from tests.support.postgres import running_postgres
    from tests.support.seaweed import seaweed_server

    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(running_postgres(durable=True))
        store_folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cbtm-chaos-store-")))
        seaweed = stack.enter_context(seaweed_server(store_folder))
        proxy = stack.enter_context(FaultProxy(seaweed.port, seed=seed))
        yield Parts(postgres, seaweed, proxy, folder)


def calm_experts(parts: Parts, *, seconds: float) -> dict[int, dict[str, str]]:
    """Of each cluster, -1 for the seed: the files of its expert when nothing goes wrong, with their SHA-256.

    Raises TimeoutError when that takes longer than `seconds`.
    """
    from tests.support.run_fixture import files_from_json

    with parts.copy("calm") as site:
        site.start_coordinators()
        site.start_workers()
        try:
            until(lambda: not checks.unfinished(site.rows("SELECT * FROM tasks")), "the calm run", seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{site.evidence()}") from error
        experts = site.rows("SELECT cluster_index, files_json FROM experts")
        left = site.stop()
        assert not left, left
    return {row["cluster_index"]: {f.path: f.sha256 for f in files_from_json(row["files_json"])} for row in experts}


def until(condition: Callable[[], bool], what: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come to its end within {seconds:.0f} s")
        time.sleep(0.2)
