"""Named points at which a test may make a process fail.

`point("worker.upload.before_commit")` does nothing unless the process was started with that point armed in the
environment: `CBTM_FAULTS="worker.upload.before_commit=kill@2"` kills it (SIGKILL) the second time it passes there.
Points stand before and after each effect that outlives the process: a row, an object, a file, a call. The list is
closed, so that a test can walk all of them.

Actions: `kill` (SIGKILL to itself), `raise` (InjectedFault, once), `stop` (SIGSTOP to itself; somebody else continues
it). `@n` counts passes from 1; 1 when left out.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping

from cbtm_common.errors import CbtmError, InvalidArgument

ENVIRONMENT_VARIABLE = "CBTM_FAULTS"

# Name -> where it stands. A point that is passed and not listed here is an error, also when nothing is armed.
POINTS: Mapping[str, str] = {
    "worker.register.after": "registered, its credential not yet on disk",
    "worker.acquire.after": "holds a lease that it has not begun to work on",
    "worker.download.after": "files are in the cache, nothing is trained",
    "worker.step.after": "an optimizer step is done",
    "worker.checkpoint.before_write": "a snapshot is taken, nothing is on disk",
    "worker.checkpoint.after_write": "the checkpoint is on disk under a temporary name",
    "worker.checkpoint.after_rename": "the checkpoint is on disk and queued",
    "worker.upload.after_prepare": "the coordinator knows of the checkpoint, no byte is sent",
    "worker.upload.after_file": "one file of several is sent",
    "worker.upload.before_commit": "every byte is sent, nothing is committed",
    "worker.upload.after_commit": "committed, the local queue does not know it",
    "worker.release.before": "the final checkpoint is committed, the lease is live",
    "worker.release.after": "released, the local state is still there",
    "coordinator.acquire.before_commit": "the lease is written, its transaction is open",
    "coordinator.acquire.after_commit": "the lease is durable, the answer is not sent",
    "coordinator.renew.after_commit": "the renewal is durable, the answer is not sent",
    "coordinator.prepare.after_begin": "the checkpoint's row is durable, no URL is signed",
    "coordinator.commit.after_complete": "multipart uploads are complete, nothing is verified",
    "coordinator.commit.after_verify": "every object is verified, no row has changed",
    "coordinator.commit.before_commit": "rows are changed, their transaction is open",
    "coordinator.commit.after_commit": "the checkpoint is visible, the answer is not sent",
    "coordinator.release.after_commit": "the release is durable, the answer is not sent",
    "coordinator.expire.before_commit": "leases are being expired, the transaction is open",
    "coordinator.expire.after_commit": "expired, nothing else is done",
    "coordinator.prune.before_delete": "a checkpoint is marked PRUNED, its objects are there",
    "coordinator.prune.after_delete": "one of its objects is deleted",
    "storage.put.before_rename": "the object's bytes are in a temporary file",
    "storage.put.after_rename": "the object is there, the answer is not sent",
}

_ACTIONS = ("kill", "raise", "stop")


class InjectedFault(CbtmError):
    """A test asked for this failure."""

    code = "INTERNAL"
    reason = "INJECTED_FAULT"


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
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            raise InjectedFault(f"injected at {name}")


_plan = FaultPlan.parse(os.environ[ENVIRONMENT_VARIABLE]) if os.environ.get(ENVIRONMENT_VARIABLE) else None


def point(name: str) -> None:
    """Fails here if a test armed this point; else does nothing."""
    if name not in POINTS:
        raise InvalidArgument(f"fault point {name!r} is not listed in cbtm_common.faults.POINTS")
    if _plan is not None:
        _plan.hit(name)
