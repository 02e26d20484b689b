"""Simulated workers: what a registry needs for them, and the calls that they make over a few shared connections."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc

from bench.processes import RunningCoordinator
from bench.puts import Send
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
from cbtm_coordinator.storage import load_or_create_key
from cbtm_coordinator.store import Store, accounts, experts, identities, runs, structure, tasks
from cbtm_coordinator.store.records import NewCluster
from cbtm_coordinator.structure.architecture import Architecture
from cbtm_coordinator.structure.manifest import STATE_FORMAT

RENEW_SECONDS = 30.0
_HARDWARE = pb.Hardware(device_type="cpu", device_name="simulated", cpu_count=1)
_RECIPE = Recipe.model_validate({"steps": 1_000_000, "lease": {"lease_seconds": 3600, "renew_seconds": RENEW_SECONDS}})


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
        run = runs.create(tx, now, name=name, cluster_count=open_tasks, recipe=_RECIPE, from_scratch=False)
        new = [
            NewCluster(cluster_index=i, documents=1, top_terms=[], examples=[], shards=[]) for i in range(open_tasks)
        ]
        runs.register_clusters(tx, run, new)
        runs.change_state(tx, now, runs.get(tx, run.id), "register", "")
        run = runs.get(tx, run.id)
        tasks.create_tasks(tx, now, run, seed_steps=0, expert_steps=_RECIPE.steps)
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
            await channel.close(None)

    async def call(self, method: str, worker: Simulated, request: Any) -> Any:
        self._next += 1
        stub = self._stubs[self._next % len(self._stubs)]
        return await getattr(stub, method)(
            request, metadata=(("authorization", f"Bearer {worker.secret}"),), timeout=30
        )

    async def acquire(self, worker: Simulated) -> Simulated:
        request = ws.AcquireLeaseRequest(request_id=new_request_id(), hardware=_HARDWARE)
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
                "recipe_sha256": _RECIPE.training_sha256(),
                "data_key": answer.spec.task.cluster_id,
            },
        )

    async def renew(self, worker: Simulated, step: int) -> None:
        progress = pb.Progress(step=step, loss=2.0, tokens_per_second=1e4, phase="train")
        request = ws.RenewLeaseRequest(
            request_id=new_request_id(), lease_id=worker.lease_id, epoch=worker.epoch, progress=progress
        )
        await self.call("RenewLease", worker, request)


async def cycle(load: Load, send: Send, worker: Simulated) -> None:
    """One task from claim to release, with a checkpoint of one small file that is really there and verified."""
    held = await load.acquire(worker)
    step = held.committed_step + 1
    data = json.dumps({**held.state, "step": step, "lease": held.lease_id}).encode()
    file = pb.FileSpec(path="state.json", size=len(data), sha256=hashlib.sha256(data).hexdigest())
    prepared = await load.call(
        "PrepareUpload",
        held,
        ws.PrepareUploadRequest(
            request_id=new_request_id(), lease_id=held.lease_id, epoch=held.epoch, step=step, files=[file]
        ),
    )
    await send(prepared.uploads[0], data)
    await load.call(
        "CommitCheckpoint",
        held,
        ws.CommitCheckpointRequest(
            request_id=new_request_id(),
            lease_id=held.lease_id,
            epoch=held.epoch,
            checkpoint_id=prepared.checkpoint.id,
        ),
    )
    await load.call(
        "ReleaseLease",
        held,
        ws.ReleaseLeaseRequest(
            request_id=new_request_id(),
            lease_id=held.lease_id,
            epoch=held.epoch,
            release_reason=ws.RELEASE_REASON_PREEMPTED,
            detail="cycle",
        ),
    )
