"""Tokens, workers, and requests that are answered once: invariant 7."""

from __future__ import annotations

from datetime import timedelta

import pytest

from cbtm_common.errors import InvalidArgument, NotFound, Unauthenticated
from cbtm_coordinator.lifecycle import WorkerState
from cbtm_coordinator.scheduler import backoff
from cbtm_coordinator.store import accounts, events, identities
from cbtm_coordinator.store.records import Progress, TokenRecord
from tests.support.registry import Registry, all_at_once


def _token(registry: Registry, *, max_uses: int = 0, ttl: timedelta | None = None) -> TokenRecord:
    with registry.store.writing() as tx:
        return identities.create_token(
            tx,
            registry.clock(),
            token_id="token_1",
            role="WORKER",
            secret_hash="a" * 64,
            label="join",
            expire_time=None if ttl is None else registry.clock() + ttl,
            max_uses=max_uses,
        )


def _use(registry: Registry) -> None:
    with registry.store.writing() as tx:
        identities.use_token(tx, registry.clock(), "token_1")


def _is_good(registry: Registry) -> bool:
    with registry.store.reading() as tx:
        return identities.find_token(tx, registry.clock(), "a" * 64) is not None


def test_a_token_with_a_limit_is_used_that_often_however_many_ask_at_once(registry: Registry) -> None:
    _token(registry, max_uses=3)
    results = all_at_once(8, lambda _: _use(registry))
    assert sum(r is None for r in results) == 3
    assert sum(isinstance(r, Unauthenticated) for r in results) == 5
    with registry.store.reading() as tx:
        assert identities.get_token(tx, "token_1").uses == 3


def test_a_token_ends_with_its_time_or_when_it_is_revoked(registry: Registry) -> None:
    _token(registry, ttl=timedelta(hours=1))
    assert _is_good(registry)
    registry.clock.advance(3600)
    assert not _is_good(registry)
    with pytest.raises(Unauthenticated):
        _use(registry)


def test_a_revoked_token_is_of_no_use_and_stays_in_the_list(registry: Registry) -> None:
    _token(registry)
    _use(registry)
    with registry.store.writing() as tx:
        assert identities.revoke_token(tx, registry.clock(), "token_1").revoked
        assert [t.label for t in identities.list_tokens(tx)] == ["join"]
        with pytest.raises(NotFound):
            identities.revoke_token(tx, registry.clock(), "token_none")
    assert not _is_good(registry)
    with pytest.raises(Unauthenticated):
        _use(registry)


def test_who_joins_belongs_to_the_account_of_its_token_be_it_one_machine_or_many(registry: Registry) -> None:
    with registry.store.writing() as tx:
        made = {
            token_id: identities.create_token(
                tx,
                registry.clock(),
                token_id=token_id,
                role="WORKER",
                secret_hash=token_id * 8,
                label=label,
                account=account,
            ).account_id
            for token_id, label, account in [
                ("t1", "ann", ""),
                ("t2", "spare", "ann"),
                ("t3", "", ""),
                ("t4", "", "bob"),
            ]
        }
        assert accounts.names(tx, made.values()) == {made["t1"]: "ann", made["t3"]: "t3", made["t4"]: "bob"}
        assert made["t1"] == made["t2"] == identities.use_token(tx, registry.clock(), "t2").account_id
    machines = [registry.worker(account="ann") for _ in range(2)]
    with registry.store.reading() as tx:
        assert {identities.get_worker(tx, machine).account_id for machine in machines} == {made["t1"]}


def test_accounts_made_at_once_under_one_name_are_one(registry: Registry) -> None:
    def make(_: int) -> str:
        with registry.store.writing() as tx:
            return accounts.named(tx, registry.clock(), "ann")

    assert len(set(all_at_once(8, make))) == 1


def test_a_worker_is_last_seen_when_its_lease_was_renewed(registry: Registry) -> None:
    registry.run()
    worker = registry.worker()
    lease = registry.lease(worker)
    registry.clock.advance(30)
    registry.renew(lease, Progress(step=1))
    with registry.store.reading() as tx:
        assert identities.get_worker(tx, worker).last_seen_time == registry.clock()
        (listed,) = identities.list_workers(tx)
    assert listed.last_seen_time == registry.clock()


def test_a_worker_that_keeps_failing_waits_longer_and_one_success_clears_it(registry: Registry) -> None:
    worker = registry.worker()
    with registry.store.writing() as tx:
        for _ in range(3):
            identities.count_failure(tx, registry.clock(), worker)
        waiting = identities.get_worker(tx, worker)
        expected = backoff(now=registry.clock(), failures=3, what="this worker")
        assert (waiting.failures, waiting.not_before_time, waiting.reason) == (3, expected.until, expected.reason)
        identities.count_success(tx, worker)
        cleared = identities.get_worker(tx, worker)
    assert (cleared.failures, cleared.not_before_time) == (0, None)
    assert (cleared.failed_tasks, cleared.finished_tasks) == (3, 1)


def test_a_revoked_worker_is_known_as_such(registry: Registry) -> None:
    worker = registry.worker()
    with registry.store.writing() as tx:
        identities.set_revoked(tx, registry.clock(), worker, "bad weights")
        found = identities.get_worker(tx, worker)
        assert (found.state, found.reason) == (WorkerState.REVOKED, "bad weights")
        assert events.list_events(tx, worker_id=worker)[-1].kind == "worker.revoked"
        with pytest.raises(NotFound):
            identities.set_revoked(tx, registry.clock(), "worker_none", "")


def test_a_retried_request_gets_the_first_answer_and_changes_nothing(registry: Registry) -> None:
    answers = [
        registry.store.once("r1", "Acquire", "w1", lambda _, n=n: str(n).encode())  # type: ignore[misc]
        for n in range(3)
    ]
    assert answers == [b"0"] * 3


def test_the_same_request_id_of_another_caller_or_method_is_another_request(registry: Registry) -> None:
    assert registry.store.once("r1", "Acquire", "w1", lambda _: b"one") == b"one"
    assert registry.store.once("r1", "Acquire", "w2", lambda _: b"two") == b"two"
    assert registry.store.once("r1", "Release", "w1", lambda _: b"three") == b"three"


def test_duplicates_that_arrive_at_once_are_carried_out_once(registry: Registry) -> None:
    _token(registry)

    def mutate(tx: object) -> bytes:
        identities.use_token(tx, registry.clock(), "token_1")  # type: ignore[arg-type]
        return b"done"

    results = all_at_once(8, lambda _: registry.store.once("r1", "Register", "w1", mutate))
    assert results == [b"done"] * 8
    with registry.store.reading() as tx:
        assert identities.get_token(tx, "token_1").uses == 1


def test_a_request_that_failed_left_nothing_and_may_be_tried_again(registry: Registry) -> None:
    _token(registry)

    def fail(tx: object) -> bytes:
        identities.use_token(tx, registry.clock(), "token_1")  # type: ignore[arg-type]
        raise InvalidArgument("name: is empty")

    with pytest.raises(InvalidArgument):
        registry.store.once("r1", "Register", "w1", fail)
    assert registry.store.once("r1", "Register", "w1", lambda _: b"second") == b"second"
    with registry.store.reading() as tx:
        assert identities.get_token(tx, "token_1").uses == 0


def test_a_mutation_without_a_request_id_is_refused(registry: Registry) -> None:
    for wrong in ("", "x" * 65):
        with pytest.raises(InvalidArgument, match="request_id"):
            registry.store.once(wrong, "Register", "w1", lambda _: b"")


def test_answers_are_forgotten_after_a_week(registry: Registry) -> None:
    registry.store.once("r1", "Register", "w1", lambda _: b"first")
    registry.clock.advance(6 * 24 * 3600)
    assert registry.store.forget_old_requests() == 0
    registry.clock.advance(2 * 24 * 3600)
    assert registry.store.forget_old_requests() == 1
