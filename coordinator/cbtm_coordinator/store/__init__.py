"""The registry: the only SQL of the system.

`Store` owns the engine and the clock. A caller opens a transaction and calls the nouns' modules with it:

    with store.writing() as tx:
        claimed = leases.acquire(tx, store.now(), worker_id)

    runs         create, get, list_runs, change_state, set_paused, remove; add_files, files; register_clusters,
                 list_clusters, list_shards
    tasks        create_tasks, get_task, task_of, list_tasks, count_open, reopen
    leases       acquire, require, release, due_leases, expire, revoke_leases, live_leases
    renewals     renew
    checkpoints  begin, get, submitted, latest_good, newest_committed
    commits      committable, commit
    completion   accept
    pruning      drop, prune_superseded, prune_finished, prune_abandoned, deletable, mark_deleted
    experts      add, seed, current, versions, quarantine
    refusals     refuse, count_failure, forget_failures
    checks       open_evaluation, open_audit, get, of_subject, report, settle
    acceptance   after_commit, decide, set_verification
    rollback     reject, strike, quarantine
    eligibility  may_take, others, has_trained, sees_held_out
    credits      earn, take_back, leaderboard, statement
    requeue      requeue_task
    accounts     named, names, find
    rejections   reject
    structure    what weights look like: of runs (add_architecture, architecture) and checkpoints (add_sizes, sizes)
    identities   tokens (create, find, use, list, revoke) and workers (create, find, seen, list, set_revoked)
    events       append, list_events

`store.once(...)` does the same for a mutation that a client may repeat, and `store.renew(...)` joins the renewals that
come at once in one transaction. Everything returned is a frozen record (`store.records`). Guarantees: what one
transaction wrote is durable when it ends, or not there at all; states change
by the table in `lifecycle` alone, with guarded updates, however many processes share the database.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime

from sqlalchemy import Connection

from cbtm_coordinator.store import (
    acceptance,
    accounts,
    checkpoints,
    checks,
    commits,
    completion,
    credits,
    eligibility,
    events,
    experts,
    identities,
    leases,
    pruning,
    refusals,
    rejections,
    requests,
    requeue,
    rollback,
    runs,
    structure,
    tasks,
)
from cbtm_coordinator.store.database import open_engine, reading, writing
from cbtm_coordinator.store.grouping import Group
from cbtm_coordinator.store.renewals import Renewal, Renewed, renew

__all__ = [
    "Connection",
    "Renewal",
    "Renewed",
    "Store",
    "acceptance",
    "accounts",
    "checkpoints",
    "checks",
    "commits",
    "completion",
    "credits",
    "eligibility",
    "events",
    "experts",
    "identities",
    "leases",
    "pruning",
    "refusals",
    "rejections",
    "requests",
    "requeue",
    "rollback",
    "runs",
    "structure",
    "tasks",
    "utc_now",
]


def utc_now() -> datetime:
    return datetime.now(UTC)


class Store:
    """The registry at `url` (`sqlite:///PATH` or `postgresql://…`); thread-safe."""

    def __init__(self, url: str, *, clock: Callable[[], datetime] = utc_now, pool_size: int = 20) -> None:
        self.engine = open_engine(url, pool_size=pool_size)
        self.now = clock
        self._renewals = Group(self._renew)

    def writing(self, *, by_statement: bool = False) -> AbstractContextManager[Connection]:
        """A transaction that may write; with `by_statement`, each statement may be one of its own."""
        return writing(self.engine, by_statement=by_statement)

    def reading(self) -> AbstractContextManager[Connection]:
        """A transaction that only reads."""
        return reading(self.engine)

    def once(
        self,
        request_id: str,
        method: str,
        principal: str,
        answer: Callable[[Connection], bytes],
        *,
        keep: Callable[[bytes], bool] = lambda _: True,
    ) -> bytes:
        """`answer(tx)` in one transaction with its record; for a request_id seen before, the first answer.

        An answer that `keep` refuses is not recorded.
        """
        return requests.once(
            self.engine,
            self.now,
            request_id=request_id,
            method=method,
            principal=principal,
            answer=answer,
            keep=keep,
        )

    def first_answer(self, request_id: str, method: str, principal: str) -> bytes | None:
        """What `once` answered to this request, if it did."""
        return requests.find(self.engine, request_id=request_id, method=method, principal=principal)

    def renew(self, renewal: Renewal) -> Renewed:
        """Extends a live lease. Raises LeaseLost, PermissionDenied, Unavailable."""
        return self._renewals(renewal)

    def _renew(self, renewals: Sequence[Renewal]) -> list[Renewed | Exception]:
        with self.writing() as tx:
            return renew(tx, self.now(), renewals)

    def ping(self) -> None:
        """Raises Unavailable when the database cannot be used."""
        with self.reading():
            pass

    def forget_old_requests(self) -> int:
        with self.writing() as tx:
            return requests.forget_old(tx, self.now())

    def close(self) -> None:
        self.engine.dispose()
