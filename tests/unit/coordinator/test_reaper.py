"""Housekeeping: what is wanted stays however old it is, what nobody knows goes, and no failure ends it."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest

from cbtm_common.errors import Unavailable
from cbtm_coordinator.lifecycle import LeaseState, TaskState
from cbtm_coordinator.services.reaper import Reaper
from cbtm_coordinator.storage.base import ListedObject, OpenUpload
from cbtm_coordinator.store import events, runs
from tests.support.registry import RECIPE, Registry, file, new_cluster

DAY = timedelta(days=1)


class Objects:
    """Keys with the time of their last change, and open uploads: all that housekeeping sees of a store."""

    def __init__(self) -> None:
        self.keys: dict[str, datetime] = {}
        self.uploads: dict[str, datetime] = {}

    def list(self, prefix: str) -> list[ListedObject]:
        return [ListedObject(key=k, size=1, modified=t) for k, t in self.keys.items() if k.startswith(prefix)]

    def list_multipart(self, prefix: str) -> list[OpenUpload]:
        return [OpenUpload(key=k, upload_id=k, started=t) for k, t in self.uploads.items() if k.startswith(prefix)]

    def delete(self, key: str) -> None:
        self.keys.pop(key, None)

    def abort_multipart(self, key: str, upload_id: str) -> None:
        del self.uploads[key]


@pytest.fixture
def objects() -> Objects:
    return Objects()


def reaper_of(registry: Registry, objects: Any, *, interval: float = 1.0) -> Reaper:
    return Reaper(registry.store, objects, interval=interval, orphan_interval=timedelta(hours=1), orphan_grace=DAY)


def test_a_lease_that_was_not_renewed_expires_and_its_task_is_open_again(registry: Registry, objects: Objects) -> None:
    registry.run()
    lease = registry.lease()
    reaper = reaper_of(registry, objects)
    assert reaper.expire_leases() == 0
    registry.clock.advance(RECIPE.lease.lease_seconds + 1)
    assert reaper.expire_leases() == 1
    assert registry.get_lease(lease).state is LeaseState.EXPIRED
    assert registry.task(lease.task_id).state is TaskState.PENDING
    assert reaper.expire_leases() == 0


def test_objects_of_superseded_checkpoints_are_deleted_and_two_are_kept(registry: Registry, objects: Objects) -> None:
    registry.run()
    lease = registry.lease()
    saved = [registry.save(lease, step)[0] for step in (10, 20, 30)]
    for checkpoint in saved:
        objects.keys |= {f.key: registry.clock() for f in checkpoint.files}
    reaper = reaper_of(registry, objects)
    assert reaper.delete_pruned() == 1
    assert set(objects.keys) == {f.key for checkpoint in saved[1:] for f in checkpoint.files}
    assert reaper.delete_pruned() == 0


def test_what_no_row_knows_is_collected_after_the_grace_period_and_not_before(
    registry: Registry, objects: Objects
) -> None:
    run = registry.run()
    strays = [
        f"runs/{run.id}/shards/stray.safetensors",
        f"runs/{run.id}/tasks/task_0/e00000001/s0000000010/state.json",
        "runs/run_0/report/report.json",
        "scratch/worker_1/abc/probe",
    ]
    objects.keys = dict.fromkeys(strays, registry.clock())
    objects.uploads = {strays[1]: registry.clock()}
    reaper = reaper_of(registry, objects)
    registry.clock.advance(3600)
    assert reaper.collect_orphans() == 0
    registry.clock.advance(DAY.total_seconds())
    assert reaper.collect_orphans() == len(strays) + 1
    assert (objects.keys, objects.uploads) == ({}, {})
    with registry.store.reading() as tx:
        assert [e.kind for e in events.list_events(tx)][-1] == "orphans.collected"


def test_what_rows_know_stays_however_old(registry: Registry, objects: Objects) -> None:
    run = registry.run()
    lease = registry.lease()
    saved = registry.save(lease, 10)[0]
    with registry.store.reading() as tx:
        shards = [shard.key for _, shard in runs.list_shards(tx, run.id)]
        known = [entry.file.key for entry in runs.files(tx, run)] + shards + [f.key for f in saved.files]
    objects.keys = dict.fromkeys(known, registry.clock())
    registry.clock.advance(10 * DAY.total_seconds())
    assert reaper_of(registry, objects).collect_orphans() == 0
    assert set(objects.keys) == set(known)


def test_an_upload_that_takes_days_is_left_to_go_on(registry: Registry, objects: Objects) -> None:
    registry.run()
    checkpoint = registry.begin(registry.lease(), 10)
    objects.uploads = {checkpoint.files[0].key: registry.clock()}
    registry.clock.advance(3 * DAY.total_seconds())
    assert reaper_of(registry, objects).collect_orphans() == 0
    assert set(objects.uploads) == {checkpoint.files[0].key}


def test_shards_of_a_draft_that_are_not_registered_yet_stay(registry: Registry, objects: Objects) -> None:
    with registry.store.writing() as tx:
        draft = runs.create(tx, registry.clock(), name="draft", cluster_count=1, recipe=RECIPE, from_scratch=False)
    key = file("shard", f"runs/{draft.id}/shards").key
    objects.keys = {key: registry.clock()}
    registry.clock.advance(3 * DAY.total_seconds())
    reaper = reaper_of(registry, objects)
    assert reaper.collect_orphans() == 0
    with registry.store.writing() as tx:
        runs.register_clusters(tx, draft, [replace(new_cluster(draft, 0), shards=[])])
        runs.change_state(tx, registry.clock(), draft, "register", "")
    assert reaper.collect_orphans() == 1, "started without it, the run does not need it"


def test_a_round_that_hangs_keeps_nobody_from_closing(registry: Registry, objects: Objects) -> None:
    reaper = reaper_of(registry, objects, interval=0.001)
    begun, answered = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        assert answered.wait(20)

    reaper.tick = hang  # type: ignore[method-assign]  # a store that does not answer
    reaper.start()
    assert begun.wait(20)
    assert not reaper.close(0.05)
    answered.set()
    assert reaper.close(20)


@pytest.mark.parametrize("failure", [Unavailable("the store is away"), RuntimeError("a defect")])
def test_a_round_that_fails_does_not_end_the_rounds(registry: Registry, objects: Objects, failure: Exception) -> None:
    rounds = threading.Semaphore(0)
    reaper = reaper_of(registry, objects, interval=0.001)

    def fail() -> None:
        rounds.release()
        raise failure

    reaper.tick = fail  # type: ignore[method-assign]  # a round that cannot succeed
    reaper.start()
    try:
        for _ in range(3):
            assert rounds.acquire(timeout=20)
    finally:
        reaper.close()
