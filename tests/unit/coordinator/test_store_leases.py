"""Claiming, renewing, giving back, expiring: invariants 1 and 2."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta

import pytest
from sqlalchemy import select

from cbtm_common.errors import LeaseLost, PermissionDenied
from cbtm_coordinator.lifecycle import LeaseState, RunState, TaskKind, TaskState
from cbtm_coordinator.scheduler import Measured
from cbtm_coordinator.store import events, identities, leases, runs, tasks
from cbtm_coordinator.store.records import LeaseRecord, Progress
from cbtm_coordinator.tables import leases as leases_table
from tests.support.registry import RECIPE, Registry, all_at_once, renewal

_RACERS = 8


def test_many_workers_at_once_get_each_task_once(registry: Registry) -> None:
    run = registry.run(clusters=_RACERS - 3)
    workers = [registry.worker(f"w{i}") for i in range(_RACERS)]
    results = all_at_once(_RACERS, lambda i: registry.acquire(workers[i]))
    won = [r for r in results if isinstance(r, LeaseRecord)]
    assert [r for r in results if isinstance(r, Exception)] == []
    assert len({lease.task_id for lease in won}) == len(won) == _RACERS - 3
    assert all(task.state is TaskState.LEASED and task.epoch == 1 for task in registry.tasks(run))


def test_a_task_taken_and_lost_over_and_over_never_sees_an_epoch_twice(registry: Registry) -> None:
    registry.run(clusters=1)
    workers = [registry.worker(f"w{i}") for i in range(4)]

    def take_and_leave(index: int) -> None:
        for _ in range(5):
            lease = registry.acquire(workers[index])
            if lease is not None:
                registry.release(lease)

    assert all_at_once(4, take_and_leave) == [None] * 4
    with registry.store.reading() as tx:
        epochs = [row.epoch for row in tx.execute(select(leases_table.c.epoch))]
    assert sorted(epochs) == list(range(1, len(epochs) + 1))


def test_the_best_candidates_are_found_among_more_than_one_query_looks_at(registry: Registry) -> None:
    run = registry.run(clusters=20)
    worker = registry.worker()
    with registry.store.writing() as tx:
        found = tasks.list_tasks(tx, run.id)
        for task in found[:-1]:
            tasks.reopen(tx, registry.clock(), task, event="release", reason="", counts=False)
    # Half of the first task is done, so the others have more left.
    first = registry.lease(worker)
    registry.save(first, 50)
    registry.release(first)
    taken = [registry.lease(worker) for _ in range(20)]
    assert taken[-1].task_id == first.task_id


def test_the_fewest_failures_come_first_and_then_the_most_steps_left(registry: Registry) -> None:
    run = registry.run(clusters=6)
    worker = registry.worker()
    for step, failed in ((30, False), (10, True), (20, False)):
        lease = registry.lease(worker)
        registry.save(lease, step)
        registry.release(lease, failed=failed)
    registry.clock.advance(3600)
    best = sorted(registry.tasks(run), key=lambda t: (t.attempts, t.committed_step - t.total_steps, t.id))
    assert [registry.lease(worker).task_id for _ in range(6)] == [task.id for task in best]


def test_a_seed_comes_before_the_experts_of_another_run(registry: Registry) -> None:
    registry.run("experts", clusters=3)
    run = registry.run("seeded", clusters=1, seed_steps=10)
    assert registry.task(registry.lease().task_id).run_id == run.id


def test_the_seed_is_trained_before_any_expert_opens(registry: Registry) -> None:
    run = registry.run(clusters=2, seed_steps=10)
    lease = registry.lease()
    assert registry.task(lease.task_id).kind is TaskKind.SEED
    assert registry.acquire(registry.worker()) is None
    registry.finish(lease)
    assert registry.get_run(run).state is RunState.TRAINING
    assert registry.task(registry.lease().task_id).kind is TaskKind.EXPERT


def test_a_worker_may_ask_for_one_run_only(registry: Registry) -> None:
    registry.run("first", clusters=1)
    second = registry.run("second", clusters=1)
    worker = registry.worker()
    lease = registry.acquire(worker, run_id=second.id)
    assert lease is not None
    assert registry.task(lease.task_id).run_id == second.id
    assert registry.acquire(worker, run_id=second.id) is None


def test_a_paused_run_gives_out_nothing_and_stops_who_renews(registry: Registry) -> None:
    run = registry.run(clusters=2)
    lease = registry.lease()
    with registry.store.writing() as tx:
        runs.set_paused(tx, registry.clock(), run, True)
    assert registry.acquire(registry.worker()) is None
    _, directive, reason = registry.renew(lease)
    assert (directive, "paused" in reason) == ("STOP", True)
    with registry.store.writing() as tx:
        runs.set_paused(tx, registry.clock(), runs.get(tx, run.id), False)
    assert registry.renew(lease)[1] == "CONTINUE"
    assert registry.acquire(registry.worker()) is not None


def test_a_renewal_extends_the_lease_and_keeps_its_progress(registry: Registry) -> None:
    registry.run()
    lease = registry.lease()
    registry.clock.advance(30)
    told = Progress(step=7, loss=2.5, tokens_per_second=100.0, phase="train", transferred_bytes=5)
    renewed, directive, _ = registry.renew(lease, told)
    assert directive == "CONTINUE"
    assert (renewed.expire_time - registry.clock()).total_seconds() == RECIPE.lease.lease_seconds
    assert renewed.renew_time == registry.clock()
    stored = registry.get_lease(lease)
    assert (stored.step, stored.loss, stored.phase, stored.transferred_bytes) == (7, 2.5, "train", 5)


def test_a_worker_whose_checkpoint_is_late_is_told_to_write_one(registry: Registry) -> None:
    registry.run()
    lease = registry.lease()
    training = Progress(step=40, phase="train")
    registry.clock.advance(RECIPE.lease.checkpoint_seconds * 2 + 1)
    assert registry.renew(lease, training)[1] == "CHECKPOINT"
    checkpoint = registry.begin(lease, 40)
    # It is on its way: asking again would only queue another one behind it.
    assert registry.renew(lease, training)[1] == "CONTINUE"
    registry.commit(lease, checkpoint)
    registry.clock.advance(RECIPE.lease.checkpoint_seconds)
    assert registry.renew(lease, Progress(step=60, phase="train"))[1] == "CONTINUE"


def test_a_silent_worker_loses_its_task_without_an_attempt_and_its_renewal_says_so(registry: Registry) -> None:
    run = registry.run(clusters=1)
    lease = registry.lease()
    assert registry.expire_due() == []
    registry.clock.advance(RECIPE.lease.lease_seconds)
    (expired,) = registry.expire_due()
    assert (expired.state, expired.end_time) == (LeaseState.EXPIRED, registry.clock())
    (task,) = registry.tasks(run)
    assert (task.state, task.attempts) == (TaskState.PENDING, 0)
    with pytest.raises(LeaseLost, match="not renewed in time"):
        registry.renew(lease)
    successor = registry.lease()
    assert (successor.task_id, successor.epoch) == (lease.task_id, lease.epoch + 1)
    assert registry.expire_due() == []


def test_a_lease_past_its_end_that_nobody_expired_is_saved_by_its_renewal(registry: Registry) -> None:
    registry.run()
    lease = registry.lease()
    registry.clock.advance(RECIPE.lease.lease_seconds * 2)
    with registry.store.reading() as tx:
        (due,) = leases.due_leases(tx, registry.clock())
    registry.renew(lease)
    with registry.store.writing() as tx:
        assert leases.expire(tx, registry.clock(), due) is None
    assert registry.get_lease(lease).state is LeaseState.LIVE


def test_expiry_by_many_coordinators_at_once_happens_once(registry: Registry) -> None:
    run = registry.run(clusters=4)
    for index in range(4):
        registry.lease(registry.worker(f"w{index}"))
    registry.clock.advance(RECIPE.lease.lease_seconds)
    results = all_at_once(4, lambda _: registry.expire_due())
    ended = [lease.id for found in results if isinstance(found, list) for lease in found]
    assert [r for r in results if isinstance(r, Exception)] == []
    assert Counter(ended).most_common(1)[0][1] == 1
    assert len(ended) == 4
    assert {task.state for task in registry.tasks(run)} == {TaskState.PENDING}


def test_a_renewed_lease_without_progress_is_taken_to_hang_and_counts_an_attempt(registry: Registry) -> None:
    run = registry.run(clusters=1)
    lease = registry.lease()
    for _ in range(21):
        registry.clock.advance(30)
        registry.renew(lease)
    (expired,) = registry.expire_due()
    assert "hangs" in expired.reason
    (task,) = registry.tasks(run)
    assert (task.state, task.attempts) == (TaskState.PENDING, 1)
    assert task.not_before_time > registry.clock()


def test_a_slow_worker_gets_a_longer_lease_and_more_patience_and_is_told_so(registry: Registry) -> None:
    registry.run(clusters=1)
    lease = registry.lease()
    slow = Measured(step_seconds=300, upload_bytes_per_second=1e6, checkpoint_bytes=8_000_000_000)
    progress = Progress(step=1, phase="train", measured=slow)
    outcome = registry.store.renew(renewal(lease, progress))
    renewed, told = outcome.lease, outcome.told
    assert told.pace.lease == timedelta(seconds=400)
    assert renewed.expire_time == registry.clock() + told.pace.lease
    assert told.pace.reason
    # Longer than a lease of the run's, and than a step of a worker that was not slow.
    for _ in range(3):
        registry.clock.advance(390)
        assert registry.expire_due() == []
        registry.renew(lease, progress)
    # Checkpoints are asked for later, too: half of the time may go by sending.
    assert told.pace.checkpoint == timedelta(seconds=RECIPE.lease.max_checkpoint_seconds)


def test_a_slow_download_is_progress(registry: Registry) -> None:
    registry.run()
    lease = registry.lease()
    for received in range(1, 41):
        registry.clock.advance(30)
        registry.renew(lease, Progress(phase="download", transferred_bytes=received))
    assert registry.expire_due() == []


def test_preemption_costs_no_attempt_and_the_task_is_open_at_once(registry: Registry) -> None:
    registry.run(clusters=1)
    lease = registry.lease()
    released, task = registry.release(lease, detail="interrupted")
    assert (released.state, released.reason) == (LeaseState.RELEASED, "interrupted")
    assert (task.state, task.attempts) == (TaskState.PENDING, 0)
    assert registry.lease().epoch == lease.epoch + 1


def test_failures_are_spaced_out_and_the_last_one_fails_task_and_run_but_not_the_other_tasks(
    registry: Registry,
) -> None:
    run = registry.run(clusters=2)
    other = registry.lease()
    task_id = ""
    for attempt in range(1, RECIPE.lease.max_attempts + 1):
        lease = registry.lease()
        _, task = registry.release(lease, failed=True, detail="loss is NaN")
        task_id = task.id
        assert task.attempts == attempt
        assert registry.acquire(registry.worker()) is None
        registry.clock.advance(3600)
        registry.renew(other, Progress(step=attempt))
    assert registry.task(task_id).state is TaskState.FAILED
    failed = registry.get_run(run)
    assert failed.state is RunState.FAILED
    assert "loss is NaN" in failed.reason
    assert registry.acquire(registry.worker()) is None
    # What the other worker does is not lost, and can be taken up again.
    registry.save(other, 50)
    registry.release(other)
    assert registry.lease().task_id == other.task_id


def test_attempts_count_from_the_last_checkpoint(registry: Registry) -> None:
    registry.run(clusters=1)
    registry.release(registry.lease(), failed=True)
    registry.clock.advance(3600)
    lease = registry.lease()
    _, task = registry.save(lease, 10)
    assert task.attempts == 0


def test_one_worker_does_not_use_up_a_task_s_attempts_while_others_are_there(registry: Registry) -> None:
    registry.run(clusters=1)
    hostile, other = registry.worker("hostile", account="mallory"), registry.worker("other", account="ann")

    def present() -> None:
        with registry.store.writing() as tx:
            identities.seen(tx, registry.clock(), other)

    for _ in range(2 * RECIPE.lease.max_attempts):
        present()
        _, task = registry.release(registry.lease(hostile), failed=True, detail="on purpose")
        assert (task.state, task.attempts) == (TaskState.PENDING, 1)
        registry.clock.advance(1800)
        assert registry.acquire(hostile) is None
        registry.clock.advance(1801)
    # Another's failure is another attempt, and after a commit all count anew.
    present()
    lease = registry.lease(other)
    assert registry.save(lease, 10)[1].attempts == 0
    registry.release(lease)
    assert registry.release(registry.lease(hostile), failed=True)[1].attempts == 1
    registry.clock.advance(120)
    assert registry.release(registry.lease(other), failed=True)[1].attempts == 2


def test_a_worker_that_is_alone_uses_up_the_attempts_so_that_its_owner_hears_of_it(registry: Registry) -> None:
    registry.run(clusters=1)
    worker = registry.worker("alone", account="ann")
    registry.worker("long gone", account="bob")
    registry.clock.advance(7200)
    for _ in range(RECIPE.lease.max_attempts):
        _, task = registry.release(registry.lease(worker), failed=True)
        registry.clock.advance(7200)
    assert task.state is TaskState.FAILED


def test_a_worker_that_fails_waits_and_one_that_is_unfit_is_not_offered_the_task_again(registry: Registry) -> None:
    registry.run(clusters=1)
    small = registry.worker("small")
    lease = registry.lease(small)
    _, task = registry.release(lease, is_unfit=True, detail="needs 30 GiB, has 8")
    assert (task.state, task.attempts) == (TaskState.PENDING, 0)
    assert registry.acquire(small) is None
    with registry.store.reading() as tx:
        assert tasks.count_open(tx) == 1
        assert tasks.count_open(tx, worker_id=small) == 0
    assert registry.lease(registry.worker("large")).task_id == task.id


def test_a_zombie_can_do_nothing_once_somebody_succeeded_it(registry: Registry) -> None:
    registry.run(clusters=1)
    zombie = registry.lease()
    pending = registry.begin(zombie, 10)
    registry.clock.advance(RECIPE.lease.lease_seconds)
    registry.expire_due()
    successor = registry.lease()
    for act in (
        lambda: registry.renew(zombie),
        lambda: registry.begin(zombie, 20),
        lambda: registry.commit(zombie, pending),
        lambda: registry.commit(zombie, pending, epoch=successor.epoch),
        lambda: registry.release(zombie),
    ):
        with pytest.raises(LeaseLost):
            act()
    assert registry.task(zombie.task_id).committed_step == 0
    registry.renew(successor)


def test_a_lease_is_of_no_use_to_another_worker_or_with_another_epoch(registry: Registry) -> None:
    registry.run(clusters=1)
    lease = registry.lease()
    with registry.store.writing() as tx, pytest.raises(PermissionDenied):
        leases.require(tx, lease.id, lease.epoch, registry_worker := "worker_other")
    assert registry_worker
    with registry.store.writing() as tx, pytest.raises(LeaseLost, match="epoch"):
        leases.require(tx, lease.id, lease.epoch + 1, lease.worker_id)
    with registry.store.writing() as tx, pytest.raises(LeaseLost, match="no lease"):
        leases.require(tx, "lease_none", 1, lease.worker_id)


def test_a_revoked_worker_loses_its_leases_at_once(registry: Registry) -> None:
    run = registry.run(clusters=2)
    bad = registry.worker("bad")
    held = [registry.lease(bad), registry.lease(bad)]
    with registry.store.writing() as tx:
        assert leases.revoke_leases(tx, registry.clock(), reason="bad weights", worker_id=bad) == 2
    assert {task.state for task in registry.tasks(run)} == {TaskState.PENDING}
    with pytest.raises(LeaseLost, match="REVOKED: bad weights"):
        registry.renew(held[0])


def test_leases_of_a_deleted_run_are_lost(registry: Registry) -> None:
    run = registry.run(clusters=1)
    lease = registry.lease()
    with registry.store.writing() as tx:
        runs.remove(tx, registry.clock(), run)
    with pytest.raises(LeaseLost, match="no lease"):
        registry.renew(lease)


def test_work_counts_as_open_until_it_is_done_or_needs_its_owner(registry: Registry) -> None:
    registry.run(clusters=1, seed_steps=10)

    def open_tasks() -> int:
        with registry.store.reading() as tx:
            return tasks.count_open(tx)

    assert open_tasks() == 2
    for _ in range(RECIPE.lease.max_attempts):
        registry.release(registry.lease(), failed=True)
        registry.clock.advance(3600)
    assert open_tasks() == 0


def test_every_change_leaves_an_event_with_its_reason(registry: Registry) -> None:
    run = registry.run(clusters=1)
    lease = registry.lease()
    registry.clock.advance(RECIPE.lease.lease_seconds + 5)
    registry.expire_due()
    with registry.store.reading() as tx:
        told = events.list_events(tx, task_id=lease.task_id)
        later = events.list_events(tx, run_id=run.id, after_id=told[0].id)
    assert [e.kind for e in told] == ["task.pending", "task.leased", "lease.expired", "task.pending"]
    assert "5 s past its end" in told[2].reason
    assert (told[2].worker_id, told[2].lease_id) == (lease.worker_id, lease.id)
    assert [e.id for e in later] == sorted(e.id for e in later)
