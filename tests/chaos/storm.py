"""The storm: faults by the schedule, while tasks are trained over and over and every invariant is watched."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg.rows import dict_row

from cbtm_common.errors import CbtmError, InvalidState
from tests.chaos import checks
from tests.chaos.schedule import Fault, Planned, schedule
from tests.chaos.site import CLUSTERS, COORDINATORS, GRACE_SECONDS, LEASE_SECONDS, WORKERS, Site, until
from tests.support.proxy import FaultRates
from tests.support.zygote import Child

# How bad transfers are while they are bad.
RATES = FaultRates(error=0.15, cut_request=0.08, truncate=0.08, slow=0.05)
_AT_ONCE = 12


@dataclass(kw_only=True)
class Outcome:
    """What the storm did, and what came of it."""

    faults: Counter[str] = field(default_factory=Counter)
    transfers: Counter[str] = field(default_factory=Counter)
    # Processes that ended by themselves, as a database that is away makes them, and were started again.
    ended: Counter[str] = field(default_factory=Counter)
    tasks_done: int = 0
    leases: Counter[str] = field(default_factory=Counter)
    checkpoints: Counter[str] = field(default_factory=Counter)
    looks: int = 0
    violations: list[str] = field(default_factory=list)

    @property
    def survived(self) -> int:
        return self.faults.total() + self.transfers.total()


class Storm:
    """Over a site whose coordinators and workers run."""

    def __init__(self, site: Site, undisturbed: Mapping[int, Mapping[str, str]], *, calm_seconds: float) -> None:
        """What is under way when the storm ends gets `calm_seconds` to be done."""
        self.site = site
        self._calm_seconds = calm_seconds
        self.outcome = Outcome()
        self._undisturbed = undisturbed
        self._watch = checks.Watch()
        self._over = threading.Event()
        self._unattended = threading.Event()
        # Nobody is hit twice at once.
        self._busy: dict[tuple[str, int], threading.Lock] = {}

    def rage(self, seed: int, *, seconds: float, every: float, on_fault: Callable[[Outcome], None]) -> Outcome:
        """Faults for `seconds`; then all is let be, and looked at."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            steady = [pool.submit(loop) for loop in (self._look, self._keep_busy)]
            supervising = pool.submit(self._supervise)
            faults: list[Future[None]] = []
            started = time.monotonic()
            for planned in schedule(seed, seconds=seconds, every=every, lease_seconds=LEASE_SECONDS):
                time.sleep(max(0.0, started + planned.at - time.monotonic()))
                faults.append(pool.submit(self._inject, planned))
                on_fault(self.outcome)
            time.sleep(max(0.0, started + seconds - time.monotonic()))
            self._over.set()
            for ending in (*steady, *faults):
                ending.result()
            # Last: those need coordinators that run.
            self._unattended.set()
            supervising.result()
        self._settle()
        self._judge()
        return self.outcome

    # While it lasts

    def _inject(self, planned: Planned) -> None:
        try:
            happened = _EFFECTS[planned.fault](self, planned)
        except Exception as error:  # noqa: BLE001  # a harness that fails has shown nothing
            self.outcome.violations.append(f"the harness failed at {planned}: {error!r}")
            return
        if happened:
            self.outcome.faults[planned.fault.value] += 1

    @contextmanager
    def _victim(self, kind: str, count: int, wanted: int) -> Iterator[int | None]:
        """One that nothing else happens to now: the wanted one or the next; None when all are taken."""
        for index in ((wanted + offset) % count for offset in range(count)):
            lock = self._busy.setdefault((kind, index), threading.Lock())
            if lock.acquire(blocking=False):
                try:
                    yield index
                finally:
                    lock.release()
                return
        yield None

    def _look(self) -> None:
        while not self._over.is_set():
            try:
                self._look_while_it_answers()
            except psycopg.Error:
                # It was crashed: that is part of the storm.
                self._over.wait(0.2)

    def _look_while_it_answers(self) -> None:
        url = self.site.parts.postgres.url(self.site.name)
        with psycopg.connect(url, row_factory=dict_row, connect_timeout=10) as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            while not self._over.is_set():
                tasks = connection.execute("SELECT id, epoch, committed_step FROM tasks").fetchall()
                live = connection.execute("SELECT id, task_id FROM leases WHERE state = 'LIVE'").fetchall()
                restarts = connection.execute(
                    "SELECT task_id, count(*) AS times FROM events WHERE kind = 'task.requeued' "
                    """AND detail_json LIKE '%"from_start": true%' GROUP BY task_id"""
                ).fetchall()
                connection.rollback()
                self._watch.look(tasks, live, {row["task_id"]: row["times"] for row in restarts})
                self._over.wait(0.2)

    def _supervise(self) -> None:
        """Starts again what ended by itself, as a service manager does."""
        while not self._unattended.wait(0.5):
            self._revive()

    def _revive(self) -> None:
        for kind, running, start in self._processes():
            for index in range(len(running)):
                lock = self._busy.setdefault((kind, index), threading.Lock())
                if not lock.acquire(blocking=False):
                    continue
                try:
                    code = running[index].poll()
                    if code is not None:
                        self.outcome.ended[f"{kind} ended with {code}"] += 1
                        running[index] = start(index)
                finally:
                    lock.release()

    def _processes(self) -> list[tuple[str, list[Child], Callable[[int], Child]]]:
        site = self.site
        return [
            ("worker", site.workers, site.start_worker),
            ("coordinator", site.coordinators, lambda index: site.start_coordinator(index, wait=False)),
        ]

    def _keep_busy(self) -> None:
        """Has every expert that is done trained anew."""
        while not self._over.wait(0.3):
            try:
                done = self.site.rows("SELECT cluster_index FROM tasks WHERE kind = 'EXPERT' AND state = 'DONE'")
                for row in done:
                    self.site.requeue(row["cluster_index"], from_start=True)
            except (CbtmError, psycopg.Error):
                # Out of reach now.
                continue

    # Faults: each tells whether it happened

    def _kill_worker(self, planned: Planned) -> bool:
        return self._end_worker(planned, signal.SIGKILL, new_machine=False)

    def _lose_worker(self, planned: Planned) -> bool:
        return self._end_worker(planned, signal.SIGKILL, new_machine=True)

    def _restart_worker(self, planned: Planned) -> bool:
        return self._end_worker(planned, signal.SIGTERM, new_machine=False)

    def _end_worker(self, planned: Planned, number: int, *, new_machine: bool) -> bool:
        with self._victim("worker", WORKERS, planned.victim) as index:
            if index is None:
                return False
            worker = self.site.workers[index]
            worker.send(number)
            if number == signal.SIGTERM:
                _leave(worker)
            else:
                worker.wait()
            time.sleep(planned.lasts)
            self.site.workers[index] = self.site.start_worker(index, new_machine=new_machine)
        return True

    def _stop_worker(self, planned: Planned) -> bool:
        with self._victim("worker", WORKERS, planned.victim) as index:
            if index is None:
                return False
            self.site.workers[index].send(signal.SIGSTOP)
            time.sleep(planned.lasts)
            self.site.workers[index].send(signal.SIGCONT)
        return True

    def _kill_coordinator(self, planned: Planned) -> bool:
        return self._end_coordinator(planned, signal.SIGKILL)

    def _restart_coordinator(self, planned: Planned) -> bool:
        return self._end_coordinator(planned, signal.SIGTERM)

    def _end_coordinator(self, planned: Planned, number: int) -> bool:
        with self._victim("coordinator", COORDINATORS, planned.victim) as index:
            if index is None:
                return False
            coordinator = self.site.coordinators[index]
            # One that starts may find no database, and end by itself.
            served = coordinator.poll() is None and "Volunteers join with" in coordinator.output
            coordinator.send(number)
            code = coordinator.wait(60)
            if number == signal.SIGTERM and served and code != 0:
                said = coordinator.evidence()
                self.outcome.violations.append(f"{coordinator.log.name} drained with exit code {code}: {said}")
            time.sleep(planned.lasts / 3)
            self.site.coordinators[index] = self.site.start_coordinator(index, wait=False)
        return True

    def _stop_coordinator(self, planned: Planned) -> bool:
        with self._victim("coordinator", COORDINATORS, planned.victim) as index:
            if index is None:
                return False
            self.site.coordinators[index].send(signal.SIGSTOP)
            time.sleep(planned.lasts)
            self.site.coordinators[index].send(signal.SIGCONT)
        return True

    def _crash_database(self, planned: Planned) -> bool:
        with self._victim("database", 1, 0) as index:
            if index is None:
                return False
            self.site.parts.postgres.crash()
        return True

    def _stop_store(self, planned: Planned) -> bool:
        with self._victim("store", 1, 0) as index:
            if index is None:
                return False
            os.kill(self.site.parts.seaweed.pid, signal.SIGSTOP)
            time.sleep(planned.lasts)
            os.kill(self.site.parts.seaweed.pid, signal.SIGCONT)
        return True

    def _worsen_transfers(self, planned: Planned) -> bool:
        with self._victim("transfers", 1, 0) as index:
            if index is None:
                return False
            self.site.parts.store_proxy.rates = RATES
            time.sleep(2 * planned.lasts)
            self.site.parts.store_proxy.rates = FaultRates()
        return True

    def _cut_link(self, planned: Planned) -> bool:
        self.site.link.cut()
        return True

    def _take_link_down(self, planned: Planned) -> bool:
        with self._victim("link", 1, 0) as index:
            if index is None:
                return False
            self.site.link.closed = True
            self.site.link.cut()
            time.sleep(planned.lasts)
            self.site.link.closed = False
        return True

    def _pause_run(self, planned: Planned) -> bool:
        with self._victim("run", 1, 0) as index:
            if index is None:
                return False
            told = self._told(lambda: self.site.set_paused(True))
            time.sleep(planned.lasts)
            # Also when the answer was lost: it may be paused all the same.
            while not self._told(lambda: self.site.set_paused(False)):
                time.sleep(0.5)
        return told

    def _requeue_task(self, planned: Planned) -> bool:
        cluster = planned.victim % CLUSTERS
        return self._told(lambda: self.site.requeue(cluster, from_start=planned.victim % 3 == 0))

    def _told(self, call: Callable[[], Any]) -> bool:
        """Whether the owner's word came through, and was possible."""
        try:
            call()
        except InvalidState:
            return True
        except CbtmError:
            return False
        return True

    # After it

    def _settle(self) -> None:
        """Everything runs again and nothing fails any more: all tasks are done, and what nobody needs goes."""
        site = self.site
        self.outcome.transfers.update(site.parts.store_proxy.injected)

        def done() -> bool:
            self._revive()
            return not checks.unfinished(site.rows("SELECT id, state, reason FROM tasks"))

        try:
            until(done, "the training of what was left", self._calm_seconds)
            until(lambda: not self._litter(), "the collection of orphans", GRACE_SECONDS + self._calm_seconds / 4)
        except TimeoutError as error:
            self.outcome.violations.append(f"{error}\n{site.evidence()}")

    def _litter(self) -> list[str]:
        site = self.site
        known = checks.known_keys(
            site.rows("SELECT key FROM run_files"),
            site.rows("SELECT key FROM shards"),
            site.rows("SELECT files_json FROM experts"),
            site.rows("SELECT files_json, state FROM checkpoints"),
        )
        return checks.orphans(site.object_keys(), known) + [
            f"an upload of {key} is open" for key in site.open_uploads()
        ]

    def _checkpoints_wrong(self, checkpoints: Sequence[checks.Row]) -> list[str]:
        """What is wrong still at a second look: one that was pruned since its row was read has lost its objects."""
        found = checks.checkpoints_wrong(checkpoints, self.site.read_object)
        if not found:
            return []
        again = checks.checkpoints_wrong(self.site.rows("SELECT * FROM checkpoints"), self.site.read_object)
        return [sentence for sentence in found if sentence in again]

    def _judge(self) -> None:
        site, outcome = self.site, self.outcome
        leases = site.rows("SELECT * FROM leases")
        checkpoints = site.rows("SELECT * FROM checkpoints")
        experts = site.rows("SELECT * FROM experts")
        outcome.violations += self._watch.violations
        outcome.violations += checks.leases_overlap(leases)
        outcome.violations += self._checkpoints_wrong(checkpoints)
        outcome.violations += checks.experts_differ(experts, self._undisturbed)
        outcome.violations += checks.unfinished(site.rows("SELECT * FROM tasks"))
        outcome.violations += checks.reasons_missing(leases, checkpoints, site.rows("SELECT * FROM events"))
        outcome.violations += self._litter()
        outcome.violations += site.stop()
        for child in site.children:
            outcome.violations += [f"{child.log.name}: {why}" for why in checks.tracebacks(child.output)]
        outcome.looks = self._watch.looks
        outcome.tasks_done = len(experts)
        outcome.leases.update(row["state"] for row in leases)
        outcome.checkpoints.update(row["state"] for row in checkpoints)


def _leave(worker: Child) -> None:
    """Its work is saved, or it is told twice, as a user would."""
    try:
        worker.wait(20)
    except AssertionError:
        worker.send(signal.SIGTERM)
        worker.wait(20)


_EFFECTS: Mapping[Fault, Callable[[Storm, Planned], bool]] = {
    Fault.WORKER_KILL: Storm._kill_worker,
    Fault.WORKER_LOSS: Storm._lose_worker,
    Fault.WORKER_STOP: Storm._stop_worker,
    Fault.WORKER_RESTART: Storm._restart_worker,
    Fault.COORDINATOR_KILL: Storm._kill_coordinator,
    Fault.COORDINATOR_STOP: Storm._stop_coordinator,
    Fault.COORDINATOR_RESTART: Storm._restart_coordinator,
    Fault.DATABASE_CRASH: Storm._crash_database,
    Fault.STORE_STOP: Storm._stop_store,
    Fault.STORE_FAULTS: Storm._worsen_transfers,
    Fault.LINK_CUT: Storm._cut_link,
    Fault.LINK_DOWN: Storm._take_link_down,
    Fault.RUN_PAUSE: Storm._pause_run,
    Fault.TASK_REQUEUE: Storm._requeue_task,
}
