"""What nobody calls for: expiring leases, pruning checkpoints, collecting orphans. One thread in each coordinator.

Every step is a guarded update or a repeatable delete, so any number of coordinators may do it at once, and one that
dies in the middle leaves nothing that the next round does not finish.
"""

from __future__ import annotations

import logging
import re
import threading
from datetime import timedelta

from cbtm_common.errors import CbtmError, NotFound
from cbtm_common.faults import point
from cbtm_coordinator.lifecycle import RunState
from cbtm_coordinator.storage import ObjectStore
from cbtm_coordinator.store import Store, acceptance, checkpoints, checks, events, leases, pruning, runs

_log = logging.getLogger(__name__)
_RUN_KEY = re.compile(r"runs/(run_[0-9a-z]+)/")
_TASK_KEY = re.compile(r"runs/run_[0-9a-z]+/tasks/(task_[0-9a-z]+)/e(\d+)/s(\d+)/")


class Reaper:
    """Runs `tick` every `interval` seconds until closed; orphans are looked for every `orphan_interval`."""

    def __init__(
        self,
        store: Store,
        objects: ObjectStore,
        *,
        interval: float = 2.0,
        orphan_interval: timedelta = timedelta(hours=1),
        orphan_grace: timedelta = timedelta(hours=24),
    ) -> None:
        self._store = store
        self._objects = objects
        self._interval = interval
        self._orphan_interval = orphan_interval
        self._orphan_grace = orphan_grace
        self._next_orphans = store.now() + orphan_interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reaper", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self, seconds: float = 30.0) -> bool:
        """Begins no other round; whether the one under way ends within `seconds`. The next process does the rest."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self.tick()
            except CbtmError as error:
                # The database or the store is away; the next round tries again.
                _log.warning("housekeeping: %s", error.message)
            except Exception:  # noqa: BLE001  # without this thread no lease would ever expire
                _log.exception("housekeeping failed; the next round tries again")

    def tick(self) -> None:
        """One round."""
        self.expire_leases()
        self.replace_failed_checks()
        self.delete_pruned()
        if self._store.now() >= self._next_orphans:
            self._next_orphans = self._store.now() + self._orphan_interval
            self._store.forget_old_requests()
            self.collect_orphans()

    def expire_leases(self) -> int:
        """Expires what is due; each lease in a transaction of its own."""
        with self._store.reading() as tx:
            due = leases.due_leases(tx, self._store.now())
        expired = 0
        for row in due:
            with self._store.writing() as tx:
                lease = leases.expire(tx, self._store.now(), row)
            point("coordinator.expire.after_commit")
            if lease is not None:
                expired += 1
                _log.info("lease %s of %s expired: %s", lease.id, lease.task_id, lease.reason)
        return expired

    def replace_failed_checks(self) -> int:
        """Checks that ended without a report are opened for others, or given up."""
        with self._store.reading() as tx:
            subjects = checks.stalled(tx)
        for task_id in subjects:
            with self._store.writing() as tx:
                acceptance.decide(tx, self._store.now(), task_id)
        return len(subjects)

    def delete_pruned(self) -> int:
        """Deletes the objects of superseded and rejected checkpoints."""
        with self._store.reading() as tx:
            stale = pruning.needs_pruning(tx, self._store.now() - self._orphan_grace)
            found = [] if stale else pruning.deletable(tx)
        if stale:
            with self._store.writing() as tx:
                pruning.prune_finished(tx)
                pruning.prune_abandoned(tx, self._store.now() - self._orphan_grace)
                found = pruning.deletable(tx)
        for checkpoint in found:
            point("coordinator.prune.before_delete")
            for file in checkpoint.files:
                self._objects.delete(file.key)
                point("coordinator.prune.after_delete")
            with self._store.writing() as tx:
                pruning.mark_deleted(tx, checkpoint.id)
            point("coordinator.prune.after_mark")
        return len(found)

    def collect_orphans(self) -> int:
        """Deletes objects and open uploads that no row knows and that are older than the grace period."""
        before = self._store.now() - self._orphan_grace
        orphans = 0
        for listed in list(self._objects.list("runs/")) + list(self._objects.list("scratch/")):
            if listed.modified < before and not self._is_known(listed.key):
                point("coordinator.orphan.before_delete")
                self._objects.delete(listed.key)
                point("coordinator.orphan.after_delete")
                orphans += 1
        for upload in list(self._objects.list_multipart("runs/")) + list(self._objects.list_multipart("scratch/")):
            # One that a row knows may go on for days, over a slow link.
            if upload.started < before and not self._is_known(upload.key):
                self._objects.abort_multipart(upload.key, upload.upload_id)
                orphans += 1
        if orphans:
            with self._store.writing() as tx:
                events.append(tx, self._store.now(), "orphans.collected", detail={"objects": orphans})
        return orphans

    def _is_known(self, key: str) -> bool:
        run = _RUN_KEY.match(key)
        if run is None:
            return False
        with self._store.reading() as tx:
            try:
                record = runs.get(tx, run.group(1))
            except NotFound:
                return False
            if record.state is RunState.DRAFT:
                # Its shards are sent first and registered last, which may take days.
                return True
            part = _TASK_KEY.match(key)
            if part is not None:
                task_id, epoch, step = part.groups()
                return checkpoints.holds_objects(tx, task_id, int(epoch), int(step))
            return runs.knows_key(tx, record.id, key)
