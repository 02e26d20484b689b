"""Named points at which a test may make a process fail.

`point("worker.upload.before_commit")` does nothing unless the process was started with that point armed in the
environment: `CBTM_FAULTS="worker.upload.before_commit=kill@2"` kills it (SIGKILL) the second time it passes there.
Points stand before and after each effect that outlives the process: a row, an object, a file, a call. The list is
closed, so that a test can walk all of them.

Actions: `kill` (SIGKILL to itself), `stop` (SIGSTOP to itself; somebody else continues it), and errors, after which
the process must go on: `raise` (a defect: InjectedFault), `lost` (a broken link or database connection: Unavailable),
`io` and `full` (a disk's OSError: EIO, ENOSPC). `@n` counts passes from 1; 1 when left out. A fault acts once, and says
so on stderr.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping

from cbtm_common.errors import CbtmError, InvalidArgument, Unavailable

ENVIRONMENT_VARIABLE = "CBTM_FAULTS"

# Name -> where it stands. A point that is passed and not listed here is an error, also when nothing is armed.
POINTS: Mapping[str, str] = {
    "worker.register.before": "nobody knows this worker",
    "worker.register.after": "registered, its credential not yet on disk",
    "worker.identity.after_write": "its credential is on disk, no call was made with it",
    "worker.acquire.before": "no lease is asked for",
    "worker.acquire.after_answer": "holds a lease that is not noted on disk",
    "worker.acquire.after": "holds a lease, noted on disk, that it has not begun to work on",
    "worker.renew.before": "a renewal is due",
    "worker.renew.after": "a renewal was answered, and nobody told",
    "worker.download.before": "nothing of the task is on disk",
    "worker.download.after": "files are in the cache, nothing is trained",
    "worker.step.after": "an optimizer step is done",
    "worker.checkpoint.before_write": "a snapshot is taken, nothing is on disk",
    "worker.checkpoint.after_write": "the checkpoint is on disk under a temporary name",
    "worker.checkpoint.after_rename": "the checkpoint is on disk and queued",
    "worker.prune.before_rename": "a checkpoint on disk is needless, and whole",
    "worker.prune.after_rename": "it has a temporary name, and its files",
    "worker.upload.before_prepare": "a checkpoint is described, the coordinator does not know of it",
    "worker.upload.after_prepare": "the coordinator knows of the checkpoint, no byte is sent",
    "worker.upload.after_file": "one file of several is sent",
    "worker.upload.before_commit": "every byte is sent, nothing is committed",
    "worker.upload.after_commit": "committed, the local queue does not know it",
    "worker.upload.after_mark": "committed, and the local queue knows",
    "worker.release.before": "the final checkpoint is committed, the lease is live",
    "worker.release.after_call": "released, the lease is still noted on disk",
    "worker.release.after": "released and forgotten, the local state is still there",
    "transfer.download.before_rename": "the bytes of a file came and were checked, under a temporary name",
    "transfer.download.after_rename": "a downloaded file is in its place",
    "transfer.upload.before_put": "a file or part is about to be sent",
    "transfer.upload.after_put": "the store has it",
    "coordinator.register.after_commit": "the worker is durable, the answer is not sent",
    "coordinator.acquire.before_commit": "the lease is written, its transaction is open",
    "coordinator.acquire.after_commit": "the lease is durable, the answer is not sent",
    "coordinator.renew.before_commit": "the renewal is written, its transaction is open",
    "coordinator.renew.after_commit": "the renewal is durable, the answer is not sent",
    "coordinator.prepare.after_begin": "the checkpoint's row is durable, no URL is signed",
    "coordinator.prepare.after_sign": "uploads in parts are open in the store, the answer is not sent",
    "coordinator.commit.after_complete": "multipart uploads are complete, nothing is verified",
    "coordinator.commit.after_verify": "every object is verified, no row has changed",
    "coordinator.commit.before_commit": "rows are changed, their transaction is open",
    "coordinator.commit.after_commit": "the checkpoint is visible, the answer is not sent",
    "coordinator.release.before_commit": "the release is written, its transaction is open",
    "coordinator.release.after_commit": "the release is durable, the answer is not sent",
    "coordinator.expire.before_commit": "leases are being expired, the transaction is open",
    "coordinator.expire.after_commit": "expired, nothing else is done",
    "coordinator.prune.before_delete": "a checkpoint is marked PRUNED, its objects are there",
    "coordinator.prune.after_delete": "one of its objects is deleted",
    "coordinator.prune.after_mark": "its row says that the objects are gone",
    "coordinator.orphan.before_delete": "an object that no row knows is old enough",
    "coordinator.orphan.after_delete": "it is deleted, no event says so",
    "storage.put.before_rename": "the object's bytes are in a temporary file",
    "storage.put.before_digest": "the object is there, its digest is not noted",
    "storage.put.after_rename": "the object is there, the answer is not sent",
    "storage.part.before_rename": "a part's bytes are in a temporary file",
    "storage.part.after_rename": "the part is there, the answer is not sent",
    "storage.multipart.before_create": "an upload in parts is to be opened",
    "storage.multipart.after_create": "it is open, nobody knows its id",
    "storage.multipart.before_complete": "every part is there, the object is not",
    "storage.multipart.after_complete": "the object is there, nobody knows",
    "storage.discard.before": "a wrong object is in the way of the right one",
    "storage.discard.after": "it is deleted",
    "database.commit.before": "a transaction has written, and is open",
    "database.commit.after": "a transaction is durable, its caller does not know",
}


class InjectedFault(CbtmError):
    """A test asked for this failure."""

    code = "INTERNAL"
    reason = "INJECTED_FAULT"


# What an error looks like to the code that meets it.
_ERRORS: Mapping[str, Callable[[str], Exception]] = {
    "raise": lambda name: InjectedFault(f"injected at {name}"),
    "lost": lambda name: Unavailable(f"the connection was lost (injected at {name})"),
    "io": lambda name: OSError(errno.EIO, f"{os.strerror(errno.EIO)} (injected at {name})"),
    "full": lambda name: OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (injected at {name})"),
}
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
_ACTIONS = (*_SIGNALS, *_ERRORS)


class FaultPlan:
    """Which points do what at which pass; thread-safe."""

    def __init__(self, plan: Mapping[str, tuple[str, int]]) -> None:
        self._plan = dict(plan)
        self._passes: dict[str, int] = {}
        self._lock = threading.Lock()

    @classmethod
    def parse(cls, text: str) -> FaultPlan:
        """From `point=action@n,point=action`. Raises InvalidArgument for unknown points and actions."""
        plan: dict[str, tuple[str, int]] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, _, what = item.partition("=")
            action, _, count = what.partition("@")
            if name not in POINTS or action not in _ACTIONS or not (count or "1").isdigit():
                raise InvalidArgument(
                    f"{ENVIRONMENT_VARIABLE}: {item!r} is not POINT=ACTION@N with a known point and one of {_ACTIONS}",
                    field=ENVIRONMENT_VARIABLE,
                )
            plan[name] = (action, int(count or "1"))
        return cls(plan)

    def hit(self, name: str) -> None:
        """Counts a pass, and acts if it is the one."""
        with self._lock:
            self._passes[name] = passes = self._passes.get(name, 0) + 1
            action, when = self._plan.get(name, ("", 0))
        if not action or passes != when:
            return
        sys.stderr.write(f"fault: {name}={action}@{when}\n")
        sys.stderr.flush()
        if action in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[action])
        else:
            raise _ERRORS[action](name)


_plan = FaultPlan.parse(os.environ[ENVIRONMENT_VARIABLE]) if os.environ.get(ENVIRONMENT_VARIABLE) else None


def point(name: str) -> None:
    """Fails here if a test armed this point; else does nothing."""
    if name not in POINTS:
        raise InvalidArgument(f"fault point {name!r} is not listed in cbtm_common.faults.POINTS")
    if _plan is not None:
        _plan.hit(name)
