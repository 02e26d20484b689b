"""What follows from reports on work: accepted, rejected, rolled back, quarantined."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from sqlalchemy import select

from cbtm_coordinator.lifecycle import CHECKING, CheckpointState, LeaseState, RunState, TaskKind, TaskState, WorkerState
from cbtm_coordinator.store import acceptance, checks, identities, requeue, rollback, runs
from cbtm_coordinator.store import tasks as task_store
from cbtm_coordinator.tables import checkpoints as checkpoints_table
from tests.support.peers import BAD, COMPUTED, EQUAL, GOOD, INVENTED, OTHER, Community
from tests.support.registry import Registry


def test_a_model_that_two_accounts_find_good_is_accepted_and_counts_for_its_trainer(registry: Registry) -> None:
    here = Community(registry, "ann", "bob", "cem")
    here.hand_in("ann")
    assert here.task.state is TaskState.SUBMITTED
    assert "waits to be checked" in here.task.reason
    here.report("bob", GOOD)
    assert here.experts() == []
    here.report("cem", GOOD)
    assert here.task.state is TaskState.DONE
    assert here.experts() == [1]
    assert registry.get_run(here.run).state is RunState.COMPLETE
    with registry.store.reading() as tx:
        ann = identities.get_worker(tx, here.workers["ann"])
    assert ann.verified_tokens == 100 * 32 * 2048


def test_nobody_checks_their_own_account_nor_twice_nor_a_cluster_that_they_trained(registry: Registry) -> None:
    here = Community(registry, "ann", "bob", "cem")
    first = here.take("bob")
    here.save(first, 40)
    registry.release(first)
    here.workers["ann again"] = registry.worker("ann again", account="ann")
    here.hand_in("ann")
    for name in ("ann", "ann again", "bob"):
        assert here.acquire(name, TaskKind.EVALUATE) is None
    held = here.take("cem", TaskKind.EVALUATE)
    assert here.acquire("cem", TaskKind.EVALUATE) is None
    assert registry.get_lease(held).state is LeaseState.LIVE
    assert here.acquire("cem") is None


def test_evaluators_that_disagree_call_a_third_and_the_minority_is_trusted_less(registry: Registry) -> None:
    here = Community(registry, "ann", "bob", "cem", "dan")
    here.hand_in("ann")
    with registry.store.writing() as tx:
        identities.change_standing(tx, here.workers["bob"], lambda s: type(s)(trust=0.8, strikes=0))
    here.report("bob", BAD)
    here.report("cem", GOOD)
    assert here.task.state is TaskState.SUBMITTED
    # Nobody is left to ask, and nobody who spoke for it is proven: no verdict.
    here.report("dan", GOOD)
    assert here.task.state is TaskState.DONE
    assert here.standing("bob")[:2] == (pytest.approx(0.4), 0)
    assert "worker.dissented" in here.kinds()


def test_a_check_that_nobody_can_do_is_opened_for_others_and_fails_no_run(registry: Registry) -> None:
    here = Community(registry, "ann", "bob", "cem")
    here.hand_in("ann")
    # Two checks of three attempts each: after five failures one of them is given up.
    for number in range(5):
        # What one worker fails again is no further attempt.
        name = f"full {number}"
        here.workers[name] = registry.worker(name, account=name)
        registry.clock.advance(120)
        registry.release(here.take(name, TaskKind.EVALUATE), failed=True, detail="no memory")
    assert registry.get_run(here.run).state is RunState.TRAINING
    with registry.store.writing() as tx:
        assert checks.stalled(tx) == [here.task_id]
        acceptance.decide(tx, registry.clock(), here.task_id)
        assert checks.stalled(tx) == []
    registry.clock.advance(120)
    here.report("cem", GOOD)
    here.report("bob", GOOD)
    assert here.task.state is TaskState.DONE


def test_false_work_is_a_strike_and_the_second_shuts_its_account_out(registry: Registry) -> None:
    here = Community(registry, "ann", "bob", "cem", "dan")
    here.workers["ann again"] = registry.worker("ann again", account="ann")
    here.trust("cem", "dan")
    here.hand_in("ann")
    here.report("bob", BAD)
    here.report("cem", BAD)
    assert here.task.state is TaskState.SUBMITTED
    here.report("dan", BAD)
    assert (here.task.state, here.task.committed_step) == (TaskState.PENDING, 0)
    assert here.standing("ann") == (0.0, 1, WorkerState.ACTIVE)
    # It is not offered to her again, but to another machine of hers.
    assert here.acquire("ann") is None
    here.hand_in("ann again")
    for name in ("bob", "cem", "dan"):
        here.report(name, BAD)
    assert here.standing("ann")[2] is here.standing("ann again")[2] is WorkerState.REVOKED
    assert here.task.state is TaskState.PENDING
    assert "account.quarantined" not in here.kinds()


def test_a_model_of_several_accounts_that_fails_strikes_nobody_and_is_trained_anew(registry: Registry) -> None:
    here = Community(registry, "ann", "bob", "cem", "dan", "eve")
    lease = here.take("ann")
    here.save(lease, 50)
    registry.release(lease)
    here.hand_in("bob")
    for name in ("cem", "dan", "eve"):
        here.report(name, BAD)
    assert (here.task.state, here.task.committed_step) == (TaskState.PENDING, 0)
    assert [here.standing(name)[:2] for name in ("ann", "bob")] == [(0.5, 0), (0.5, 0)]


def test_a_false_segment_is_rolled_back_to_the_last_checkpoint_of_somebody_else(registry: Registry) -> None:
    here = Community(registry, "ann", "bob", "cem", "dan", "eve")
    here.trust("dan", "eve")
    lease = here.take("ann")
    here.save(lease, 20)
    here.save(lease, 30)
    registry.release(lease)
    lease = here.take("bob")
    false = here.save(lease, 40, audited=True)
    # Superseded thrice, and kept: ann's last one, and both ends of what is replayed.
    for step in (50, 60, 70):
        here.save(lease, step)
    here.report("cem", OTHER)
    assert here.task.state is TaskState.LEASED
    here.report("dan", OTHER)
    assert here.task.state is TaskState.LEASED
    here.report("eve", OTHER)
    assert (here.task.state, here.task.committed_step) == (TaskState.PENDING, 30)
    resumed = registry.resume_from(here.task_id)
    assert resumed is not None
    assert resumed.step == 30
    assert registry.get_lease(lease).state is LeaseState.REVOKED
    assert registry.get_checkpoint(false).state is CheckpointState.REJECTED
    assert here.standing("bob")[:2] == (0.0, 1)
    assert here.standing("ann")[1] == 0


def test_one_word_against_a_segment_is_not_enough_while_another_can_be_asked(registry: Registry) -> None:
    here = Community(registry, "ann", "bob", "cem", "dan")
    here.hand_in("ann", audited=True)
    here.report("bob", GOOD)
    here.report("cem", GOOD)
    assert here.task.state is TaskState.SUBMITTED
    here.report("dan", OTHER)
    here.report("bob", EQUAL)
    assert here.task.state is TaskState.SUBMITTED
    here.report("cem", EQUAL)
    assert here.task.state is TaskState.DONE
    assert here.standing("ann")[1] == 0


def test_two_slanderers_drawn_together_convict_nobody_and_the_verdict_strikes_both(registry: Registry) -> None:
    here = Community(registry, "ann", "sly", "vic", "bob", "cem", "dan")
    here.trust("sly", "vic", "bob", "cem", "dan")
    here.hand_in("ann")
    here.report("sly", BAD)
    here.report("vic", BAD)
    assert here.task.state is TaskState.SUBMITTED
    for name in ("bob", "cem", "dan"):
        here.report(name, GOOD)
    assert here.task.state is TaskState.DONE
    assert here.standing("ann")[1] == 0
    assert [here.standing(name) for name in ("sly", "vic")] == [(0.0, 1, WorkerState.ACTIVE)] * 2
    assert all(here.standing(name)[1] == 0 for name in ("bob", "cem", "dan"))
    assert here.kinds().count("worker.struck") == 2


def test_a_question_is_for_proven_accounts_as_long_as_there_are_any(registry: Registry) -> None:
    here = Community(registry, "ann", "sly", "vic", "new", "bob")
    here.trust("bob")
    here.hand_in("ann")
    here.report("sly", BAD)
    here.report("vic", BAD)
    assert here.acquire("new", TaskKind.EVALUATE) is None
    here.report("bob", GOOD)
    # Nobody proven is left: a newcomer may be asked again.
    assert here.acquire("new", TaskKind.EVALUATE) is not None
    assert here.task.state is TaskState.SUBMITTED


def test_who_lies_in_two_reports_is_shut_out(registry: Registry) -> None:
    here = Community(registry, "ann", "sly", "bob", "cem", "dan")
    here.trust("sly", "bob", "cem", "dan")
    lease = here.take("ann")
    for step in (20, 40):
        here.save(lease, step, audited=True)
        here.report("sly", OTHER, moved=INVENTED)
        assert here.standing("sly")[1] == step / 20 - 1
        for name in ("bob", "cem", "dan"):
            here.report(name, EQUAL)
    assert here.standing("sly")[2] is WorkerState.REVOKED
    assert here.standing("ann")[1] == 0
    assert here.task.committed_step == 40


def test_a_liar_that_trained_on_the_task_is_undone_with_it(registry: Registry) -> None:
    """The verdict on its report comes first; then what it trained before is taken back."""
    here = Community(registry, "sly", "ann", "bob", "cem", "dan")
    here.trust("bob", "cem", "dan")
    lease = here.take("sly")
    here.save(lease, 20)
    registry.release(lease)
    with registry.store.writing() as tx:
        identities.change_standing(tx, here.workers["sly"], lambda s: replace(s, strikes=1))
    lease = here.take("ann")
    here.save(lease, 40, audited=True)
    here.report("sly", OTHER, moved=INVENTED)
    for name in ("bob", "cem", "dan"):
        here.report(name, EQUAL)
    assert here.standing("sly")[2] is WorkerState.REVOKED
    assert (here.task.state, here.task.committed_step) == (TaskState.PENDING, 0)
    assert here.standing("ann")[1] == 0


def test_an_invented_audit_acquits_no_cheat(registry: Registry) -> None:
    here = Community(registry, "ann", "lazy", "bob", "cem", "dan")
    here.trust("lazy", "bob", "cem", "dan")
    here.hand_in("ann", audited=True)
    elsewhere = {"equal": False, "deviation": 0.01, "computation": asdict(replace(COMPUTED, environment="unusual"))}
    here.report("lazy", elsewhere, moved=(0.0, 0.0, 0.0))
    assert "audit.passed" not in here.kinds()
    for name in ("bob", "cem", "dan"):
        here.report(name, OTHER)
    assert (here.standing("ann")[1], here.standing("lazy")[1]) == (1, 1)
    assert here.task.state is TaskState.PENDING


def test_whoever_saw_the_held_out_text_is_replayed_at_every_segment(registry: Registry) -> None:
    here = Community(registry, "ann", "bob", "cem", "dan")
    here.hand_in("ann")
    for name in ("bob", "cem", "dan"):
        here.report(name, BAD)
    lease = here.take("bob")
    here.save(lease, 50)
    with registry.store.reading() as tx:
        kinds = [c.kind for c in checks.of_subject(tx, here.task_id) if not c.settled]
    assert kinds == [TaskKind.AUDIT]


def test_a_quarantine_falls_back_to_the_version_before_or_opens_the_task_again(registry: Registry) -> None:
    here = Community(registry, "ann", "bob", "cem", "dan")

    def redo(name: str) -> None:
        here.hand_in(name)
        for evaluator in ("cem", "dan"):
            here.report(evaluator, GOOD)

    redo("ann")
    with registry.store.writing() as tx:
        run = runs.get(tx, here.run.id)
        requeue.requeue_task(tx, registry.clock(), run, here.task, from_start=True)
    redo("bob")
    assert here.experts() == [2]
    quarantine(here, "bob")
    assert here.experts() == [1]
    assert here.task.state is TaskState.DONE
    assert registry.get_run(here.run).state is RunState.COMPLETE
    quarantine(here, "ann")
    assert here.experts() == []
    assert (here.task.state, here.task.committed_step) == (TaskState.PENDING, 0)
    assert registry.get_run(here.run).state is RunState.TRAINING
    with registry.store.reading() as tx:
        states = set(tx.execute(select(checkpoints_table.c.state)).scalars())
    assert states == {CheckpointState.REJECTED.value}
    assert here.standing("ann")[2] is WorkerState.REVOKED


def quarantine(here: Community, name: str) -> None:
    registry = here.registry
    with registry.store.writing() as tx:
        account_id = identities.get_worker(tx, here.workers[name]).account_id
        rollback.quarantine(tx, registry.clock(), account_id, "not believed any more")


def test_a_check_task_stands_for_itself_in_no_status_and_no_requeue(registry: Registry) -> None:
    here = Community(registry, "ann", "bob")
    here.hand_in("ann", audited=True)
    with registry.store.reading() as tx:
        assert [t.kind for t in task_store.list_tasks(tx, here.run.id)] == [TaskKind.EXPERT]
        assert task_store.task_of(tx, here.run, 0).id == here.task_id
        found = checks.of_subject(tx, here.task_id)
    assert {c.kind for c in found} == CHECKING
