"""What one coordinator carries: simulated workers over real gRPC to a real process and a real PostgreSQL.

    python -m bench.coordinator [--quick] [--database sqlite] [--insecure]

Renewals at the pace of 10,000 live leases, renewals as fast as they go, full cycles (acquire, prepare, commit,
release), the coordinator's memory, and the cost of each call as the registry grows. PostgreSQL runs with fsync on.
The load generator shares the machine's cores with what it measures. What a cycle uploads is put into the store beside
the coordinator, as an S3 server takes it, and verified by the coordinator; and once more through the coordinator's own
HTTP endpoint. The published figure beside the cycles is BOINC's: 8.8 million tasks a day on one server, 102 a second.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import numpy as np
import psutil

from bench.processes import RunningCoordinator, running_coordinator
from bench.report import Report
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_api.v1.worker_service_pb2_grpc import WorkerServiceStub
from cbtm_common.files import FileSpec
from cbtm_common.ids import new_id, new_request_id
from cbtm_common.keys import key_id
from cbtm_common.recipe import Recipe
from cbtm_common.rpc import CHANNEL_OPTIONS, host_and_port
from cbtm_common.security import Trust
from cbtm_coordinator.config import SIGNING_KEY_NAME
from cbtm_coordinator.services.credentials import Credentials
from cbtm_coordinator.storage import LocalStore, UrlSigner, load_or_create_key
from cbtm_coordinator.store import Store, accounts, experts, identities, runs, structure, tasks
from cbtm_coordinator.store.records import NewCluster
from cbtm_coordinator.structure.architecture import Architecture
from cbtm_coordinator.structure.manifest import STATE_FORMAT
from tests.support.postgres import running_postgres

HARDWARE = pb.Hardware(device_type="cpu", device_name="simulated", cpu_count=1)
RENEW_SECONDS = 30.0
RECIPE = Recipe.model_validate({"steps": 1_000_000, "lease": {"lease_seconds": 3600, "renew_seconds": RENEW_SECONDS}})
# Calls in flight while as many as possible are made.
SATURATION = 64
CYCLES_IN_FLIGHT = 32


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """A registered worker, and the lease that it holds."""

    secret: str
    lease_id: str = ""
    epoch: int = 0
    committed_step: int = 0
    # Fields of state.json that the coordinator checks, but for the step.
    state: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where the coordinator listens."""

    grpc: str
    http: str
    trust: Trust
    data_dir: Path


def target_of(coordinator: RunningCoordinator) -> Target:
    host, port = host_and_port(coordinator.address)
    return Target(
        grpc=coordinator.address,
        http=coordinator.http_url,
        trust=coordinator.security.trust(host, port, ""),
        data_dir=coordinator.data_dir,
    )


def fill(store: Store, *, open_tasks: int, name: str) -> str:
    """A run with `open_tasks` PENDING tasks, whose models have no tensors, so that a checkpoint is one small file."""
    with store.writing() as tx:
        now = store.now()
        run = runs.create(tx, now, name=name, cluster_count=open_tasks, recipe=RECIPE, from_scratch=False)
        new = [
            NewCluster(cluster_index=i, documents=1, top_terms=[], examples=[], shards=[]) for i in range(open_tasks)
        ]
        runs.register_clusters(tx, run, new)
        runs.change_state(tx, now, runs.get(tx, run.id), "register", "")
        run = runs.get(tx, run.id)
        tasks.create_tasks(tx, now, run, seed_steps=0, expert_steps=RECIPE.steps)
        seed = [FileSpec(path="config.json", key=f"runs/{run.id}/base/config.json", size=1, sha256="0" * 64)]
        experts.add(tx, now, run_id=run.id, cluster_id=None, cluster_index=-1, files=seed)
        structure.add_architecture(tx, run.id, Architecture(tensors={}, trained={}).to_json())
        runs.change_state(tx, now, run, "start_training", "")
    return run.id


def make_workers(store: Store, count: int, data_dir: Path) -> list[Simulated]:
    """Registered, with a credential for a day."""
    credentials = Credentials(load_or_create_key(data_dir / SIGNING_KEY_NAME), clock=store.now, life=timedelta(days=1))
    made = []
    with store.writing() as tx:
        account_id = accounts.named(tx, store.now(), "simulated")
        for number in range(count):
            worker_id, public_key = new_id("worker"), secrets.token_bytes(32)
            identities.create_worker(
                tx,
                store.now(),
                worker_id=worker_id,
                account_id=account_id,
                name=f"simulated-{number}",
                public_key=public_key.hex(),
                token_id=None,
                hardware_json="{}",
                version="0.1.0",
            )
            made.append(Simulated(secret=credentials.issue(worker_id, key_id(public_key))))
    return made


def open_channel(target: Target, options: list[tuple[str, int]]) -> grpc.aio.Channel:
    if target.trust.plain:
        return grpc.aio.insecure_channel(target.grpc, options=options)
    credentials = grpc.ssl_channel_credentials(target.trust.roots)
    return grpc.aio.secure_channel(target.grpc, credentials, options=options)


class Load:
    """Calls as many workers, over a few shared connections."""

    def __init__(self, target: Target, connections: int = 4) -> None:
        self._channels = [
            open_channel(target, [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]) for _ in range(connections)
        ]
        self._stubs = [WorkerServiceStub(channel) for channel in self._channels]
        self._next = 0

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def call(self, method: str, worker: Simulated, request: Any) -> Any:
        self._next += 1
        stub = self._stubs[self._next % len(self._stubs)]
        return await getattr(stub, method)(
            request, metadata=(("authorization", f"Bearer {worker.secret}"),), timeout=30
        )

    async def acquire(self, worker: Simulated) -> Simulated:
        request = ws.AcquireLeaseRequest(request_id=new_request_id(), hardware=HARDWARE)
        answer = await self.call("AcquireLease", worker, request)
        if not answer.HasField("lease"):
            raise RuntimeError(f"no task was left: {answer.reason}")
        return Simulated(
            secret=worker.secret,
            lease_id=answer.lease.id,
            epoch=answer.lease.epoch,
            committed_step=answer.spec.task.committed_step,
            state={
                "format": STATE_FORMAT,
                "task_id": answer.spec.task.id,
                "kind": "expert",
                "total_steps": answer.spec.task.total_steps,
                "recipe_sha256": RECIPE.training_sha256(),
                "data_key": answer.spec.task.cluster_id,
            },
        )

    async def renew(self, worker: Simulated, step: int) -> None:
        progress = pb.Progress(step=step, loss=2.0, tokens_per_second=1e4, phase="train")
        request = ws.RenewLeaseRequest(
            request_id=new_request_id(), lease_id=worker.lease_id, epoch=worker.epoch, progress=progress
        )
        await self.call("RenewLease", worker, request)


async def timed(action: Awaitable[Any], into: list[float]) -> Any:
    started = time.perf_counter()
    result = await action
    into.append(time.perf_counter() - started)
    return result


async def saturate(
    make: Callable[[int], Awaitable[Any]], *, seconds: float, in_flight: int
) -> tuple[float, list[float]]:
    """As many calls as go, `in_flight` at a time: (calls a second, latencies)."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds
    count = iter(range(1 << 60))

    async def one() -> None:
        while time.perf_counter() < end:
            await timed(make(next(count)), latencies)

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(in_flight)))
    return len(latencies) / (time.perf_counter() - started), latencies


async def paced(make: Callable[[int], Awaitable[Any]], *, rate: float, seconds: float) -> list[float]:
    """Calls at a fixed rate, whatever their latency; latencies count from when a call was due."""
    latencies: list[float] = []
    started = time.perf_counter()
    pending = set()

    async def one(number: int, due: float) -> None:
        await make(number)
        latencies.append(time.perf_counter() - due)

    for number in range(int(rate * seconds)):
        due = started + number / rate
        delay = due - time.perf_counter()
        if delay > 0:
            await asyncio.sleep(delay)
        task = asyncio.create_task(one(number, due))
        pending.add(task)
        task.add_done_callback(pending.discard)
    await asyncio.gather(*pending)
    return latencies


class Puts:
    """PUTs over kept connections, by hand: an HTTP library would cost more than the server that is measured."""

    def __init__(self, target: Target) -> None:
        self._host, _, self._port = target.http.partition("://")[2].partition(":")
        self._tls = None if target.trust.plain else target.trust.http_context()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __call__(self, upload: pb.Upload, data: bytes) -> None:
        path, headers = upload.request.url, upload.request.headers
        if self._idle:
            reader, writer = self._idle.pop()
        else:
            reader, writer = await asyncio.open_connection(self._host, int(self._port), ssl=self._tls)
        lines = [f"PUT {path} HTTP/1.1", f"host: {self._host}", f"content-length: {len(data)}"]
        lines += [f"{name}: {value}" for name, value in headers.items() if name.lower() != "content-length"]
        writer.write("\r\n".join([*lines, "", ""]).encode() + data)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"PUT {path}: {head.decode()}")
        await reader.readexactly(int(head.lower().partition(b"content-length:")[2].partition(b"\r")[0]))
        self._idle.append((reader, writer))

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


# Brings the bytes of a signed upload to the store.
Send = Callable[[pb.Upload, bytes], Awaitable[None]]


def placing(folder: Path) -> Send:
    """Straight into the embedded store's folder."""
    store = LocalStore(folder, UrlSigner(secrets.token_bytes(32)))

    async def place(upload: pb.Upload, data: bytes) -> None:
        store.put_bytes(upload.file.key, data)

    return place


async def cycle(load: Load, send: Send, worker: Simulated) -> None:
    """One task from claim to release, with a checkpoint of one small file that is really there and verified."""
    held = await load.acquire(worker)
    step = held.committed_step + 1
    data = json.dumps({**held.state, "step": step, "lease": held.lease_id}).encode()
    file = pb.FileSpec(path="state.json", size=len(data), sha256=hashlib.sha256(data).hexdigest())
    lease = {"lease_id": held.lease_id, "epoch": held.epoch}
    prepared = await load.call(
        "PrepareUpload", held, ws.PrepareUploadRequest(request_id=new_request_id(), step=step, files=[file], **lease)
    )
    await send(prepared.uploads[0], data)
    await load.call(
        "CommitCheckpoint",
        held,
        ws.CommitCheckpointRequest(request_id=new_request_id(), checkpoint_id=prepared.checkpoint.id, **lease),
    )
    await load.call(
        "ReleaseLease",
        held,
        ws.ReleaseLeaseRequest(
            request_id=new_request_id(), release_reason=ws.RELEASE_REASON_PREEMPTED, detail="cycle", **lease
        ),
    )


def p99(latencies: list[float]) -> float:
    return 1000 * float(np.percentile(latencies, 99))


async def measure(report: Report, store: Store, target: Target, pid: int, *, workers: int, seconds: float) -> None:
    name = f"{workers:,} live leases"
    load = Load(target)
    simulated = make_workers(store, workers, target.data_dir)
    acquire_latencies: list[float] = []
    held: list[Simulated] = []
    for start in range(0, workers, SATURATION):
        batch = [timed(load.acquire(w), acquire_latencies) for w in simulated[start : start + SATURATION]]
        held += await asyncio.gather(*batch)
    rate = workers / RENEW_SECONDS
    latencies = await paced(lambda n: load.renew(held[n % workers], n), rate=rate, seconds=seconds)
    small = "sqlite" in str(store.engine.url)
    bar = 50 if small else 100
    report.add(f"{name}: p99 of renewals at {rate:.0f}/s", p99(latencies), "ms", bar=bar, sense="at most")
    report.add(f"{name}: p50 of renewals", 1000 * float(np.median(latencies)), "ms")
    speed, _ = await saturate(lambda n: load.renew(held[n % workers], n), seconds=seconds, in_flight=SATURATION)
    report.add("renewals, as many as go", speed, "/s", bar=None if small else 1000)
    fill(store, open_tasks=CYCLES_IN_FLIGHT * 4, name=f"cycles-{workers}")
    cyclers = make_workers(store, CYCLES_IN_FLIGHT * 2, target.data_dir)
    free = asyncio.Queue[Simulated]()
    for worker in cyclers:
        free.put_nowait(worker)
    puts = Puts(target)
    for how, send in (
        ("", placing(target.data_dir / "objects")),
        (", with the upload through its HTTP endpoint", puts),
    ):

        async def one(_: int, send: Send = send) -> None:
            worker = await free.get()
            await cycle(load, send, worker)
            free.put_nowait(worker)

        speed, _ = await saturate(one, seconds=seconds, in_flight=CYCLES_IN_FLIGHT)
        bar = None if small or how else 150
        report.add(f"full cycles (acquire, prepare, commit, release){how}", speed, "/s", bar=bar)
        report.add(f"the same against BOINC's published 102/s{how}", speed / 102, "x")
    puts.close()
    memory = psutil.Process(pid).memory_info().rss / 2**20
    report.add("coordinator's memory", memory, "MiB", bar=1024, sense="at most")
    await load.close()


async def curve(report: Report, store: Store, target: Target, sizes: list[int], seconds: float) -> None:
    """Acquire and renew as the number of tasks grows: the cost should not."""
    load = Load(target)
    costs: dict[str, list[float]] = {"acquire": [], "renew": []}
    total = 0
    for size in sizes:
        fill(store, open_tasks=size - total, name=f"curve-{size}")
        total = size
        workers = make_workers(store, 50, target.data_dir)
        acquired: list[float] = []
        held = [await timed(load.acquire(w), acquired) for w in workers]
        renewed: list[float] = []
        for number in range(200):
            await timed(load.renew(held[number % len(held)], number), renewed)
        for name, values in (("acquire", acquired), ("renew", renewed)):
            costs[name].append(1000 * float(np.median(values)))
            report.add(f"{name} with {size:,} tasks: p50, one at a time", costs[name][-1], "ms")
    for name, values in costs.items():
        ratio = values[-1] / values[0]
        report.add(f"{name}: {sizes[-1]:,} tasks against {sizes[0]:,}", ratio, "x", bar=1.5, sense="at most")
    await load.close()


def run(report: Report, stack: ExitStack, database: str, *, quick: bool, insecure: bool) -> None:
    scratch = Path(stack.enter_context(TemporaryDirectory()))
    url = ""
    if database == "postgresql":
        url = stack.enter_context(running_postgres(durable=True)).url()
    environment = {"CBTM_DATABASE_URL": url} if url else {}
    environment |= {"CBTM_INSECURE": "1"} if insecure else {}
    coordinator = stack.enter_context(running_coordinator(scratch / "coordinator", environment))
    store = Store(url or f"sqlite:///{scratch / 'coordinator' / 'registry.db'}")
    stack.callback(store.close)
    target = target_of(coordinator)
    workers = 1000 if database == "sqlite" or quick else 10_000
    seconds = 4.0 if quick else 30.0
    fill(store, open_tasks=workers, name="main")
    asyncio.run(measure(report, store, target, coordinator.pid, workers=workers, seconds=seconds))
    if database == "postgresql":
        sizes = [100, 1000, 10_000] if quick else [100, 1000, 10_000, 100_000]
        asyncio.run(curve(report, store, target, sizes, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer leases, under 60 s")
    parser.add_argument("--database", choices=["postgresql", "sqlite"], default="postgresql")
    parser.add_argument("--insecure", action="store_true", help="without TLS, to compare")
    options = parser.parse_args()
    report = Report(bench=f"coordinator ({options.database})")
    with ExitStack() as stack:
        run(report, stack, options.database, quick=options.quick, insecure=options.insecure)
    report.finish()


if __name__ == "__main__":
    main()
