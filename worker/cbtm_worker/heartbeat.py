"""Renews a lease on a thread of its own, carries progress there, directives and the lease's pace back.

Time is monotonic and local: what the coordinator's clock says does not matter, nor this machine's own date. When the
coordinator cannot be reached, or fails by itself, training goes on and renewals are tried again, for the lease may well
outlive the outage; only the coordinator's own word ends it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import CbtmError, LeaseLost, NotFound, PermissionDenied, Unauthenticated
from cbtm_common.faults import point
from cbtm_common.protos import from_duration
from cbtm_worker.session import Held, Session

_log = logging.getLogger(__name__)
# What the coordinator says of the lease itself. Any other error says something of the coordinator or the link.
_FINAL = (LeaseLost, NotFound, PermissionDenied, Unauthenticated)
# A renewal under way is not waited for longer when the lease is given up.
_CLOSE_SECONDS = 2.0


class Heartbeat:
    """Keeps one lease alive between `start` and `close`; thread-safe. `clock` gives seconds, monotonic.

    `say` tells the volunteer, also when the thread that trains hangs.
    """

    def __init__(
        self,
        session: Session,
        held: Held,
        policy: pb.LeasePolicy,
        *,
        committed_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = _log.warning,
    ) -> None:
        self._session = session
        self._held = held
        self._clock = clock
        self._say = say
        self._interval = from_duration(policy.renew_interval).total_seconds()
        self._policy = self._sized = policy
        self._progress = pb.Progress(step=committed_step, committed_step=committed_step, phase="download")
        self._renewed = clock()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._lost: CbtmError | None = None
        self._checkpoint = False
        # Set when the lease is lost: transfers and waits give up at once.
        self.ended = threading.Event()
        # Set when the coordinator wants the task back.
        self.stop = threading.Event()
        self.stop_reason = ""
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(_CLOSE_SECONDS)

    @property
    def seconds_left(self) -> float:
        """Until the lease ends if it is not renewed again, by this machine's clock."""
        return from_duration(self._sized.lease_duration).total_seconds() - self.silent_seconds

    @property
    def checkpoint_seconds(self) -> float:
        """From one checkpoint to the next, as the coordinator sizes it by what this worker measures."""
        return from_duration(self._sized.checkpoint_interval).total_seconds()

    @property
    def silent_seconds(self) -> float:
        """Since the coordinator last answered a renewal."""
        return self._clock() - self._renewed

    @property
    def is_cut_off(self) -> bool:
        """Whether renewals fail: the last two at least went unanswered."""
        return self.silent_seconds > 2 * self._interval + 1.0

    @property
    def lost(self) -> CbtmError | None:
        return self._lost

    def check(self) -> None:
        """Raises what ended the lease, if something did."""
        if self._lost is not None:
            raise self._lost

    def take_checkpoint_request(self) -> bool:
        """Whether the coordinator asked for a checkpoint since the last call."""
        with self._lock:
            asked, self._checkpoint = self._checkpoint, False
        return asked

    def update(
        self,
        *,
        phase: str,
        step: int | None = None,
        loss: float = 0.0,
        tokens_per_second: float = 0.0,
        step_seconds: float = 0.0,
    ) -> None:
        """Notes progress for the next renewal."""
        with self._lock:
            self._progress.phase = phase
            if step is not None:
                self._progress.step = step
                self._progress.loss = loss
                self._progress.tokens_per_second = tokens_per_second
                self._progress.step_seconds = step_seconds

    def committed(self, step: int) -> None:
        with self._lock:
            self._progress.committed_step = max(step, self._progress.committed_step)

    def uploads(self, *, checkpoint_bytes: int, bytes_per_second: float) -> None:
        """Notes how large checkpoints are, and how fast they go; 0 for what is not known yet."""
        with self._lock:
            self._progress.checkpoint_bytes = checkpoint_bytes or self._progress.checkpoint_bytes
            self._progress.upload_bytes_per_second = bytes_per_second or self._progress.upload_bytes_per_second

    def moved(self, count: int) -> None:
        """Counts bytes of transfers, so that a slow link is seen to make progress."""
        with self._lock:
            self._progress.transferred_bytes += count

    @property
    def progress(self) -> pb.Progress:
        with self._lock:
            copy = pb.Progress()
            copy.CopyFrom(self._progress)
            return copy

    def _run(self) -> None:
        while not self._closed.wait(self._interval):
            self.beat()
            if self._lost is not None:
                return

    def beat(self) -> None:
        """One renewal."""
        asked = self._clock()
        try:
            point("worker.renew.before")
            answer = self._session.renew(self._held, self.progress, timeout=max(5.0, self._interval))
            point("worker.renew.after")
        except _FINAL as error:
            self._lost = error
            self.ended.set()
            # Now: the thread that trains may never come to say it, for a device that hangs.
            self._say(f"the lease is over: {error.message}")
            return
        except CbtmError as error:
            _log.warning("the lease cannot be renewed now: %s; training goes on", error.message)
            return
        except Exception:  # noqa: BLE001  # without this thread the lease would end while all else goes well
            _log.exception("a renewal failed; the next is tried")
            return
        with self._lock:
            # The lease counts from when the coordinator wrote it, which is after it was asked.
            self._renewed = asked
            self._progress.renew_seconds = self._clock() - asked
            self._checkpoint |= answer.directive == ws.DIRECTIVE_CHECKPOINT
        self._pace(answer.policy if answer.HasField("policy") else self._policy)
        if answer.directive == ws.DIRECTIVE_STOP:
            self.stop_reason = answer.reason
            self.stop.set()

    def _pace(self, policy: pb.LeasePolicy) -> None:
        """Takes over what the coordinator sized; said when checkpoints become much rarer, or less rare again."""
        before = self.checkpoint_seconds
        self._sized = policy
        now = self.checkpoint_seconds
        if now > 1.5 * before or before > 1.5 * now:
            why = f": {policy.reason}" if policy.reason else ""
            self._say(f"a checkpoint every {now:.0f} s from now on{why}")
