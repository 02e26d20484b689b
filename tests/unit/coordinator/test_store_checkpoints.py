"""Checkpoints become visible whole, in order, once; finished ones become experts: invariant 3's states."""

from __future__ import annotations

import pytest
from sqlalchemy import update

from cbtm_common.errors import InvalidArgument, InvalidState, LeaseLost, PermissionDenied
from cbtm_coordinator.lifecycle import CheckpointState, LeaseState, RunState, TaskState
from cbtm_coordinator.store import checkpoints, experts, identities, leases, pruning, requeue
from cbtm_coordinator.store.records import CheckpointRecord, ExpertRecord, RunRecord, TaskRecord
from cbtm_coordinator.tables import checkpoints as checkpoints_table
from tests.support.registry import RECIPE, Registry, all_at_once, file


def _deletable(registry: Registry) -> list[str]:
    with registry.store.reading() as tx:
        return [c.id for c in pruning.deletable(tx)]


def _experts(registry: Registry, run: RunRecord) -> list[ExpertRecord]:
    with registry.store.reading() as tx:
        return experts.current(tx, run.id)


def _requeue(registry: Registry, run: RunRecord, task: TaskRecord, *, from_start: bool = False) -> TaskRecord:
    with registry.store.writing() as tx:
        current = registry.get_run(run)
        return requeue.requeue_task(tx, registry.clock(), current, task, from_start=from_start)


def test_a_checkpoint_is_resumed_from_only_once_it_is_committed(registry: Registry) -> None:
    registry.run()
    lease = registry.lease()
    begun = registry.begin(lease, 10)
    assert begun.state is CheckpointState.UPLOADING
    assert registry.resume_from(lease.task_id) is None
    committed, task = registry.commit(lease, begun)
    assert (committed.state, committed.commit_time) == (CheckpointState.COMMITTED, registry.clock())
    assert (task.state, task.committed_step) == (TaskState.LEASED, 10)
    resume = registry.resume_from(lease.task_id)
    assert resume is not None
    assert resume.files == begun.files


def test_beginning_the_same_checkpoint_again_finds_it_also_when_it_is_committed(registry: Registry) -> None:
    registry.run()
    lease = registry.lease()
    first = registry.begin(lease, 10)
    assert registry.begin(lease, 10) == first
    registry.commit(lease, first)
    again = registry.begin(lease, 10)
    assert (again.id, again.state) == (first.id, CheckpointState.COMMITTED)


@pytest.mark.parametrize("step", [0, -1, RECIPE.steps + 1])
def test_a_step_that_the_task_does_not_have_is_refused(registry: Registry, step: int) -> None:
    registry.run()
    with pytest.raises(InvalidArgument, match="step"):
        registry.begin(registry.lease(), step)


def test_a_step_behind_the_committed_one_is_refused(registry: Registry) -> None:
    registry.run()
    lease = registry.lease()
    registry.save(lease, 20)
    with pytest.raises(InvalidArgument, match="committed step 20"):
        registry.begin(lease, 10)


def test_files_announced_anew_after_they_were_verified_are_not_committed_unseen(registry: Registry) -> None:
    registry.run()
    lease = registry.lease()
    verified = registry.begin(lease, 10)
    other = registry.begin(lease, 10, [file("state.json", "runs/r", content="other")])
    assert other.id == verified.id
    with pytest.raises(InvalidState, match="other files"):
        registry.commit(lease, verified)
    assert registry.task(lease.task_id).committed_step == 0
    assert registry.commit(lease, other)[0].state is CheckpointState.COMMITTED


def test_a_commit_repeated_at_once_from_many_threads_happens_once(registry: Registry) -> None:
    run = registry.run(clusters=1)
    lease = registry.lease()
    last = registry.begin(lease, RECIPE.steps)
    results = all_at_once(4, lambda _: registry.commit(lease, last)[0].state)
    assert set(results) == {CheckpointState.ACCEPTED}
    assert [(e.cluster_index, e.version) for e in _experts(registry, run)] == [(-1, 1), (0, 1)]


def test_an_expired_lease_without_successor_may_still_commit_what_it_sent(registry: Registry) -> None:
    registry.run(clusters=1)
    lease = registry.lease()
    begun = registry.begin(lease, 10)
    registry.clock.advance(RECIPE.lease.lease_seconds)
    registry.expire_due()
    _, task = registry.commit(lease, begun)
    assert (task.state, task.committed_step) == (TaskState.PENDING, 10)


def test_a_released_or_revoked_lease_commits_nothing(registry: Registry) -> None:
    registry.run(clusters=2)
    released, revoked = registry.lease(), registry.lease()
    sent = {lease.id: registry.begin(lease, 10) for lease in (released, revoked)}
    registry.release(released)
    with registry.store.writing() as tx:
        leases.revoke_leases(tx, registry.clock(), reason="bad", task_id=revoked.task_id)
    for lease in (released, revoked):
        with pytest.raises(LeaseLost):
            registry.commit(lease, sent[lease.id])


def test_the_verification_may_end_after_a_successor_took_over_and_is_then_refused(registry: Registry) -> None:
    registry.run(clusters=1)
    zombie = registry.lease()
    verified = registry.begin(zombie, 10)
    registry.clock.advance(RECIPE.lease.lease_seconds)
    registry.expire_due()
    successor = registry.lease()
    with pytest.raises(LeaseLost, match=f"epoch {successor.epoch}"):
        registry.commit(zombie, verified)
    assert registry.get_checkpoint(verified).state is CheckpointState.UPLOADING


def test_a_checkpoint_of_another_lease_is_refused(registry: Registry) -> None:
    registry.run(clusters=2)
    mine, other = registry.lease(), registry.lease()
    begun = registry.begin(mine, 10)
    with pytest.raises(PermissionDenied):
        registry.commit(other, begun)


def test_the_final_checkpoint_becomes_the_expert_with_paths_within_its_model(registry: Registry) -> None:
    run = registry.run(clusters=2)
    worker = registry.worker()
    lease = registry.lease(worker)
    final, task = registry.save(lease, RECIPE.steps)
    assert (final.state, final.final) == (CheckpointState.ACCEPTED, True)
    assert task.state is TaskState.DONE
    assert registry.get_lease(lease).state is LeaseState.LIVE
    seed, expert = _experts(registry, run)
    assert (seed.cluster_id, seed.version) == (None, 1)
    assert (expert.cluster_id, expert.checkpoint_id) == (task.cluster_id, final.id)
    assert [f.path for f in expert.files] == ["model.safetensors"]
    assert expert.files[0].key == next(f.key for f in final.files if f.path == "model/model.safetensors")
    released, _ = registry.release(lease)
    assert released.state is LeaseState.RELEASED
    with registry.store.reading() as tx:
        assert identities.get_worker(tx, worker).finished_tasks == 1


def test_the_run_is_complete_with_its_last_expert_and_not_before(registry: Registry) -> None:
    run = registry.run(clusters=2)
    registry.finish(registry.lease())
    assert registry.get_run(run).state is RunState.TRAINING
    registry.finish(registry.lease())
    assert registry.get_run(run).state is RunState.COMPLETE
    assert registry.acquire(registry.worker()) is None


def test_last_experts_accepted_at_once_complete_the_run(registry: Registry) -> None:
    run = registry.run(clusters=6)
    held = [registry.lease() for _ in range(6)]
    last = [registry.begin(lease, RECIPE.steps) for lease in held]
    results = all_at_once(6, lambda i: registry.commit(held[i], last[i])[1].state)
    assert results == [TaskState.DONE] * 6
    assert registry.get_run(run).state is RunState.COMPLETE


def test_the_accepted_seed_opens_the_experts(registry: Registry) -> None:
    run = registry.run(clusters=2, seed_steps=10)
    assert [t.state for t in registry.tasks(run)] == [TaskState.PENDING, TaskState.BLOCKED, TaskState.BLOCKED]
    registry.finish(registry.lease())
    assert [t.state for t in registry.tasks(run)] == [TaskState.DONE, TaskState.PENDING, TaskState.PENDING]
    (seed,) = _experts(registry, run)
    assert (seed.cluster_index, seed.version) == (-1, 1)
    assert registry.get_run(run).state is RunState.TRAINING


def test_all_but_the_two_newest_checkpoints_may_be_deleted(registry: Registry) -> None:
    registry.run(clusters=1)
    lease = registry.lease()
    overtaken = registry.begin(lease, 5)
    saved = [registry.save(lease, step)[0] for step in (10, 20, 30, 40)]
    assert sorted(_deletable(registry)) == sorted([overtaken.id, saved[0].id, saved[1].id])
    with registry.store.writing() as tx:
        pruning.mark_deleted(tx, saved[0].id)
    assert saved[0].id not in _deletable(registry)
    resume = registry.resume_from(lease.task_id)
    assert resume is not None
    assert resume.step == 40


def test_when_a_task_is_done_only_its_final_checkpoint_is_kept(registry: Registry) -> None:
    registry.run(clusters=1)
    lease = registry.lease()
    saved = [registry.save(lease, step)[0] for step in (10, 20)]
    registry.finish(lease)
    with registry.store.writing() as tx:
        assert pruning.needs_pruning(tx, registry.clock())
        pruning.prune_finished(tx)
        assert not pruning.needs_pruning(tx, registry.clock())
    assert sorted(_deletable(registry)) == sorted(c.id for c in saved)


def test_an_upload_is_given_up_only_when_its_lease_is_over_and_it_is_old(registry: Registry) -> None:
    registry.run(clusters=1)
    lease = registry.lease()
    begun = registry.begin(lease, 10)

    def prune() -> CheckpointState:
        before = registry.clock()
        with registry.store.writing() as tx:
            needed = pruning.needs_pruning(tx, before)
            pruning.prune_abandoned(tx, before)
        state = registry.get_checkpoint(begun).state
        assert needed == (state is CheckpointState.PRUNED)
        return state

    registry.clock.advance(3600)
    assert prune() is CheckpointState.UPLOADING
    registry.release(lease)
    assert prune() is CheckpointState.PRUNED


def test_requeue_from_the_start_forgets_checkpoints_and_fences_off_late_commits(registry: Registry) -> None:
    run = registry.run(clusters=1)
    lease = registry.lease()
    old = registry.save(lease, 60)[0]
    late = registry.begin(lease, 70)
    registry.clock.advance(RECIPE.lease.lease_seconds)
    registry.expire_due()
    task = _requeue(registry, run, registry.task(lease.task_id), from_start=True)
    assert (task.state, task.committed_step, task.attempts) == (TaskState.PENDING, 0, 0)
    assert registry.resume_from(task.id) is None
    with pytest.raises(LeaseLost):
        registry.commit(lease, late)
    # The new life's first checkpoint is behind the old one's, and is the one that counts.
    again = registry.lease()
    new = registry.save(again, 10)[0]
    assert again.epoch > lease.epoch
    assert registry.resume_from(task.id) == new
    assert sorted(_deletable(registry)) == sorted([old.id, late.id])


def test_requeue_of_a_held_task_takes_it_away_and_goes_on_from_its_checkpoint(registry: Registry) -> None:
    run = registry.run(clusters=1)
    lease = registry.lease()
    registry.save(lease, 40)
    task = _requeue(registry, run, registry.task(lease.task_id))
    assert (task.state, task.committed_step) == (TaskState.PENDING, 40)
    with pytest.raises(LeaseLost, match="put the task back"):
        registry.renew(lease)
    assert registry.lease().step == 40


def test_requeue_of_a_finished_cluster_trains_a_second_version_beside_the_first(registry: Registry) -> None:
    run = registry.run(clusters=1)
    lease = registry.lease()
    registry.finish(lease)
    with pytest.raises(InvalidState, match="from-start"):
        _requeue(registry, run, registry.task(lease.task_id))
    _requeue(registry, run, registry.task(lease.task_id), from_start=True)
    assert registry.get_run(run).state is RunState.TRAINING
    assert [e.version for e in _experts(registry, run)] == [1, 1]
    registry.finish(registry.lease())
    assert [(e.cluster_index, e.version) for e in _experts(registry, run)] == [(-1, 1), (0, 2)]
    assert registry.get_run(run).state is RunState.COMPLETE


def test_requeue_of_failed_tasks_mends_the_run_with_the_last_of_them(registry: Registry) -> None:
    run = registry.run(clusters=2)
    for _ in range(RECIPE.lease.max_attempts * 2):
        registry.release(registry.lease(), failed=True)
        registry.clock.advance(3600)
    failed = registry.tasks(run)
    assert {t.state for t in failed} == {TaskState.FAILED}
    _requeue(registry, run, failed[0])
    assert registry.get_run(run).state is RunState.FAILED
    # What was put back is worked on at once.
    assert registry.lease().task_id == failed[0].id
    _requeue(registry, run, failed[1])
    assert registry.get_run(run).state is RunState.TRAINING


def test_requeue_gives_an_unfit_worker_another_chance(registry: Registry) -> None:
    run = registry.run(clusters=1)
    worker = registry.worker()
    _, task = registry.release(registry.lease(worker), is_unfit=True)
    assert registry.acquire(worker) is None
    _requeue(registry, run, task)
    assert registry.acquire(worker) is not None


def test_a_task_that_waits_for_the_seed_or_a_seed_that_is_used_cannot_be_requeued(registry: Registry) -> None:
    run = registry.run(clusters=1, seed_steps=10)
    seed, blocked = registry.tasks(run)
    with pytest.raises(InvalidState, match="waits for the seed"):
        _requeue(registry, run, blocked)
    registry.finish(registry.lease())
    with pytest.raises(InvalidState, match="experts branched"):
        _requeue(registry, run, registry.task(seed.id), from_start=True)


def test_objects_of_visible_and_coming_checkpoints_are_wanted_and_no_others(registry: Registry) -> None:
    registry.run(clusters=1)
    lease = registry.lease()
    checkpoint = registry.begin(lease, 10)

    def wanted(epoch: int = lease.epoch) -> bool:
        with registry.store.reading() as tx:
            return checkpoints.holds_objects(tx, lease.task_id, epoch, 10)

    assert wanted()
    assert not wanted(lease.epoch + 1)
    with registry.store.writing() as tx:
        _set_state(tx, checkpoint, CheckpointState.PRUNED)
    assert not wanted()


def _set_state(tx: object, checkpoint: CheckpointRecord, state: CheckpointState) -> None:
    where = checkpoints_table.c.id == checkpoint.id
    tx.execute(update(checkpoints_table).where(where).values(state=state.value))  # type: ignore[attr-defined]


def test_a_pruned_checkpoint_cannot_be_committed(registry: Registry) -> None:
    registry.run(clusters=1)
    lease = registry.lease()
    begun = registry.begin(lease, 10)
    with registry.store.writing() as tx:
        _set_state(tx, begun, CheckpointState.PRUNED)
    with pytest.raises(InvalidState, match="PRUNED"):
        registry.commit(lease, begun)
    assert registry.task(lease.task_id).committed_step == 0
