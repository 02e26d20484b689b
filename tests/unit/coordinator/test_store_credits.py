"""Credit: each accepted segment counts once, for whoever trained it, and is taken back from who is shut out."""

from __future__ import annotations

import pytest
from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError

from cbtm_coordinator.lifecycle import CreditKind
from cbtm_coordinator.store import identities, requeue, rollback, runs
from cbtm_coordinator.store.credits import LeaderboardBy, StatementLine, leaderboard, statement
from cbtm_coordinator.tables import credits
from tests.support.registry import RECIPE, Registry

STEP = RECIPE.step_tokens()


def tokens(registry: Registry, worker_id: str) -> int:
    """Of a worker, which must be the sum of its entries."""
    with registry.store.reading() as tx:
        entries = tx.execute(select(credits.c.tokens).where(credits.c.worker_id == worker_id)).scalars().all()
        kept = identities.get_worker(tx, worker_id).verified_tokens
    assert kept == sum(entries)
    return kept


def account_of(registry: Registry, worker_id: str) -> str:
    with registry.store.reading() as tx:
        return identities.get_worker(tx, worker_id).account_id


def lines(registry: Registry, worker_id: str) -> list[StatementLine]:
    with registry.store.reading() as tx:
        return statement(tx, account_of(registry, worker_id))


def quarantine(registry: Registry, worker_id: str) -> None:
    with registry.store.writing() as tx:
        rollback.quarantine(tx, registry.clock(), account_of(registry, worker_id), "it lied")


def hand_over(registry: Registry, *, at: int = 40) -> tuple[str, str]:
    """(worker that trains to `at`, worker that finishes), of two accounts, on one task."""
    first, second = registry.worker("first", account="ann"), registry.worker("second", account="bob")
    lease = registry.lease(first)
    registry.save(lease, at)
    registry.release(lease)
    registry.finish(registry.lease(second))
    return first, second


def test_each_worker_is_credited_what_it_trained_of_an_accepted_model(registry: Registry) -> None:
    run = registry.run(clusters=1)
    first, second = hand_over(registry)
    assert (tokens(registry, first), tokens(registry, second)) == (40 * STEP, 60 * STEP)
    (line,) = lines(registry, first)
    assert (line.kind, line.run_name, line.cluster_index, line.tokens) == (CreditKind.EARNED, run.name, 0, 40 * STEP)


def test_work_that_is_not_accepted_yet_counts_for_nobody(registry: Registry) -> None:
    registry.run(clusters=1)
    worker = registry.worker()
    registry.save(registry.lease(worker), 40)
    assert tokens(registry, worker) == 0


def test_a_seed_counts_with_its_own_batch(registry: Registry) -> None:
    seed_phase = RECIPE.seed_phase.model_copy(update={"global_batch": 3 * RECIPE.global_batch})
    registry.run(clusters=1, seed_steps=10, recipe=RECIPE.model_copy(update={"seed_phase": seed_phase}))
    worker = registry.worker()
    registry.finish(registry.lease(worker))
    assert tokens(registry, worker) == 10 * 3 * STEP
    assert lines(registry, worker)[0].cluster_index == -1


def test_quarantine_takes_back_by_new_entries_and_from_nobody_else(registry: Registry) -> None:
    registry.run(clusters=1)
    first, second = hand_over(registry)
    quarantine(registry, second)
    assert (tokens(registry, first), tokens(registry, second)) == (40 * STEP, 0)
    assert [(line.kind, line.tokens) for line in lines(registry, second)] == [
        (CreditKind.EARNED, 60 * STEP),
        (CreditKind.TAKEN_BACK, -60 * STEP),
    ]
    # Said again, it takes back no more.
    quarantine(registry, second)
    assert tokens(registry, second) == 0


def test_a_segment_that_a_later_version_goes_on_from_counts_once(registry: Registry) -> None:
    """The second half is undone; whoever does it anew goes on from the first, whose maker is not paid twice."""
    run = registry.run(clusters=1)
    first, second = hand_over(registry)
    quarantine(registry, second)
    third = registry.worker("third", account="cat")
    lease = registry.lease(third)
    begun_at = registry.task(lease.task_id).committed_step
    registry.finish(lease)
    assert registry.get_run(run).state.value == "COMPLETE"
    assert tokens(registry, first) == 40 * STEP
    assert tokens(registry, third) == (100 - begun_at) * STEP


def test_a_task_that_its_owner_starts_anew_is_new_work(registry: Registry) -> None:
    run = registry.run(clusters=1)
    worker = registry.worker()
    registry.finish(registry.lease(worker))
    (task,) = registry.tasks(run)
    with registry.store.writing() as tx:
        requeue.requeue_task(tx, registry.clock(), runs.get_by_id(tx, run.id), task, from_start=True)
    registry.finish(registry.lease(worker))
    assert tokens(registry, worker) == 2 * 100 * STEP


def test_credit_outlives_its_run(registry: Registry) -> None:
    run = registry.run(clusters=1)
    worker = registry.worker()
    registry.finish(registry.lease(worker))
    with registry.store.writing() as tx:
        runs.remove(tx, registry.clock(), runs.get(tx, run.id))
    assert tokens(registry, worker) == 100 * STEP
    assert lines(registry, worker)[0].run_name == run.name


def test_the_leaderboard_adds_up_accounts_and_pages_without_a_gap(registry: Registry) -> None:
    registry.run(clusters=5)
    workers = [registry.worker(f"w{n}", account=account) for n, account in enumerate(("ann", "bob", "ann", "cat"))]
    for worker in (*workers[:3], workers[0], workers[2]):
        registry.finish(registry.lease(worker))
    with registry.store.reading() as tx:
        by_account = leaderboard(tx, LeaderboardBy.ACCOUNT)
        by_worker = leaderboard(tx, LeaderboardBy.WORKER)
        paged, after = [], None
        while page := leaderboard(tx, LeaderboardBy.WORKER, after=after, limit=1):
            paged += page
            after = page[-1].verified_tokens, page[-1].id
    assert [(row.name, row.verified_tokens, row.workers) for row in by_account] == [
        ("ann", 400 * STEP, 2),
        ("bob", 100 * STEP, 1),
        ("cat", 0, 1),
    ]
    assert [row.verified_tokens for row in by_worker] == [200 * STEP, 200 * STEP, 100 * STEP, 0]
    assert [row.id for row in by_worker[:2]] == sorted([workers[0], workers[2]])
    assert paged == by_worker


def test_the_registry_itself_refuses_a_second_credit_and_a_wrong_sign(registry: Registry) -> None:
    registry.run(clusters=1)
    registry.finish(registry.lease())
    with registry.store.reading() as tx:
        entry = dict(tx.execute(select(credits)).mappings().one())
    for wrong in (
        {"id": None},
        {"id": None, "checkpoint_id": "ckpt_other", "tokens": -1},
        {"id": None, "kind": "TAKEN_BACK"},
    ):
        with pytest.raises(IntegrityError), registry.store.writing() as tx:
            tx.execute(insert(credits).values({**entry, **wrong}))
