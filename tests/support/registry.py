"""A registry for tests: a clock that is set by hand, and short ways to a run with tasks, workers and commits."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from cbtm_common.files import FileSpec
from cbtm_common.ids import new_id
from cbtm_common.recipe import LeaseRecipe, Recipe
from cbtm_coordinator.store import (
    Renewal,
    Store,
    accounts,
    checkpoints,
    commits,
    experts,
    identities,
    leases,
    runs,
    tasks,
)
from cbtm_coordinator.store.records import (
    CheckpointRecord,
    LeaseRecord,
    NewCluster,
    NewShard,
    Progress,
    RunRecord,
    TaskRecord,
)
from cbtm_coordinator.tables import metadata

_T = TypeVar("_T")
RECIPE = Recipe(
    steps=100, lease=LeaseRecipe(lease_seconds=60, renew_seconds=10, checkpoint_seconds=100, max_attempts=3)
)


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.time = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time

    def advance(self, seconds: float) -> datetime:
        self.time += timedelta(seconds=seconds)
        return self.time


class Registry:
    """A store with its clock; each method is one transaction, as a service would make it."""

    def __init__(self, url: str) -> None:
        self.clock = Clock()
        self.store = Store(url, clock=self.clock)

    def wipe(self) -> None:
        """Empty again, at the first instant: a new engine for each test would compile every statement anew."""
        self.clock.time = Clock().time
        with self.store.writing() as tx:
            for table in reversed(metadata.sorted_tables):
                tx.execute(table.delete())

    def run(self, name: str = "web", *, clusters: int = 2, seed_steps: int = 0, recipe: Recipe = RECIPE) -> RunRecord:
        """A run that has started: TRAINING, or SEEDING with `seed_steps`."""
        with self.store.writing() as tx:
            now = self.clock()
            run = runs.create(tx, now, name=name, cluster_count=clusters, recipe=recipe, from_scratch=seed_steps > 0)
            runs.register_clusters(tx, run, [new_cluster(run, index) for index in range(clusters)])
            runs.add_files(tx, run.id, "BASE_MODEL", [file("model.safetensors", f"runs/{run.id}/base")])
            runs.change_state(tx, now, run, "register", "")
            run = runs.get(tx, run.id)
            tasks.create_tasks(tx, now, run, seed_steps=seed_steps, expert_steps=recipe.steps)
            if seed_steps:
                runs.change_state(tx, now, run, "start_seeding", "")
            else:
                base = [entry.file for entry in runs.files(tx, run, "BASE_MODEL")]
                experts.add(tx, now, run_id=run.id, cluster_id=None, cluster_index=-1, files=base)
                runs.change_state(tx, now, run, "start_training", "")
            return runs.get(tx, run.id)

    def worker(self, name: str = "gpu", *, account: str = "volunteers") -> str:
        worker_id = new_id("worker")
        with self.store.writing() as tx:
            identities.create_worker(
                tx,
                self.clock(),
                worker_id=worker_id,
                account_id=accounts.named(tx, self.clock(), account),
                name=name,
                # Of 32 bytes, as a key is; nobody has the private one.
                public_key=hashlib.sha256(worker_id.encode()).hexdigest(),
                token_id=None,
                hardware_json="{}",
                version="0.1.0",
            )
        return worker_id

    def acquire(self, worker_id: str, *, run_id: str | None = None) -> LeaseRecord | None:
        with self.store.writing() as tx:
            claimed = leases.acquire(tx, self.clock(), worker_id, run_id=run_id)
        return claimed.lease if claimed else None

    def lease(self, worker_id: str | None = None) -> LeaseRecord:
        """A lease that must be there to get."""
        lease = self.acquire(worker_id or self.worker())
        assert lease is not None
        return lease

    def renew(self, lease: LeaseRecord, progress: Progress | None = None) -> tuple[LeaseRecord, str, str]:
        """(lease, directive, reason)."""
        renewed = self.store.renew(renewal(lease, progress))
        return renewed.lease, renewed.told.directive.value, renewed.told.reason

    def begin(self, lease: LeaseRecord, step: int, files: Sequence[FileSpec] | None = None) -> CheckpointRecord:
        with self.store.writing() as tx:
            held, task = leases.require(tx, lease.id, lease.epoch, lease.worker_id)
            prefix = f"runs/{task.run_id}/tasks/{task.id}/e{lease.epoch:08d}/s{step:010d}"
            wanted = files or [file("model/model.safetensors", prefix), file("state.json", prefix)]
            return checkpoints.begin(tx, self.clock(), lease=held, task=task, step=step, files=wanted)

    def commit(
        self, lease: LeaseRecord, checkpoint: CheckpointRecord, *, epoch: int | None = None
    ) -> tuple[CheckpointRecord, TaskRecord]:
        with self.store.writing() as tx:
            return commits.commit(
                tx,
                self.clock(),
                checkpoint=checkpoint,
                worker_id=lease.worker_id,
                epoch=lease.epoch if epoch is None else epoch,
                metrics={"loss": 1.0},
            )

    def save(self, lease: LeaseRecord, step: int) -> tuple[CheckpointRecord, TaskRecord]:
        """A checkpoint begun and committed."""
        return self.commit(lease, self.begin(lease, step))

    def release(
        self, lease: LeaseRecord, *, failed: bool = False, is_unfit: bool = False, detail: str = ""
    ) -> tuple[LeaseRecord, TaskRecord]:
        with self.store.writing() as tx:
            return leases.release(
                tx,
                self.clock(),
                lease_id=lease.id,
                epoch=lease.epoch,
                worker_id=lease.worker_id,
                failed=failed,
                is_unfit=is_unfit,
                detail=detail,
            )

    def finish(self, lease: LeaseRecord) -> TaskRecord:
        """The final checkpoint committed, and the lease given back."""
        self.save(lease, self.task(lease.task_id).total_steps)
        return self.release(lease)[1]

    def expire_due(self) -> list[LeaseRecord]:
        with self.store.reading() as tx:
            due = leases.due_leases(tx, self.clock())
        ended = []
        for lease in due:
            with self.store.writing() as tx:
                ended.append(leases.expire(tx, self.clock(), lease))
        return [lease for lease in ended if lease is not None]

    def task(self, task_id: str) -> TaskRecord:
        with self.store.reading() as tx:
            return tasks.get_task(tx, task_id)

    def tasks(self, run: RunRecord) -> list[TaskRecord]:
        with self.store.reading() as tx:
            return tasks.list_tasks(tx, run.id)

    def get_run(self, run: RunRecord) -> RunRecord:
        with self.store.reading() as tx:
            return runs.get(tx, run.id)

    def get_lease(self, lease: LeaseRecord) -> LeaseRecord:
        with self.store.reading() as tx:
            return leases.get_lease(tx, lease.id)

    def get_checkpoint(self, checkpoint: CheckpointRecord) -> CheckpointRecord:
        with self.store.reading() as tx:
            return checkpoints.get(tx, checkpoint.id)

    def resume_from(self, task_id: str) -> CheckpointRecord | None:
        with self.store.reading() as tx:
            return checkpoints.latest_good(tx, tasks.get_task(tx, task_id))


def renewal(lease: LeaseRecord, progress: Progress | None = None) -> Renewal:
    return Renewal(
        lease_id=lease.id,
        epoch=lease.epoch,
        worker_id=lease.worker_id,
        progress=progress or Progress(step=lease.step),
    )


def file(path: str, prefix: str = "runs/r", *, content: str = "") -> FileSpec:
    digest = hashlib.sha256((content or path).encode()).hexdigest()
    return FileSpec(path=path, key=f"{prefix}/{path}", size=10, sha256=digest)


def new_cluster(run: RunRecord, index: int, *, shards: int = 2) -> NewCluster:
    """A cluster with `shards` training shards of 1,000 tokens, and a held-out one of 100."""
    train = [
        NewShard(
            split="TRAIN", ordinal=i, file=file(f"{index}-{i}", f"runs/{run.id}/shards"), tokens=1000, documents=10
        )
        for i in range(shards)
    ]
    held_out = file(f"{index}-held-out", f"runs/{run.id}/shards")
    return NewCluster(
        cluster_index=index,
        documents=10 * shards + 1,
        top_terms=["alpha", "beta"],
        examples=["An example."],
        shards=[*train, NewShard(split="HELD_OUT", ordinal=0, file=held_out, tokens=100, documents=1)],
    )


def all_at_once(count: int, action: Callable[[int], _T]) -> list[_T | Exception]:
    """`action(i)` on `count` threads that start together; results or exceptions, in order."""
    gate = threading.Barrier(count)

    def one(index: int) -> _T | Exception:
        gate.wait()
        try:
            return action(index)
        except Exception as error:  # noqa: BLE001  # the caller looks at it
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))
