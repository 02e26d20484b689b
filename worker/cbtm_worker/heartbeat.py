"""Renews a lease on a thread of its own, carries progress there and directives back.

Time is monotonic and local: what the coordinator's clock says does not matter. When the coordinator cannot be reached,
or fails by itself, training goes on and renewals are tried again, for the lease may well outlive the outage; only the
coordinator's own word ends it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import CbtmError, LeaseLost, NotFound, PermissionDenied, Unauthenticated
from cbtm_common.protos import from_duration
from cbtm_worker.session import Held, Session

_log = logging.getLogger(__name__)
# What the coordinator says of the lease itself. Any other error says something of the coordinator or the link.
_FINAL = (LeaseLost, NotFound, PermissionDenied, Unauthenticated)
# A renewal under way is not waited for longer when the lease is given up.
_CLOSE_SECONDS = 2.0


class Heartbeat:
    """Keeps one lease alive between `start` and `close`; thread-safe. `clock` gives seconds, monotonic."""

    def __init__(
        self,
        session: Session,
        held: Held,
        policy: pb.LeasePolicy,
        *,
        committed_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session = session
        self._held = held
        self._clock = clock
        self._interval = from_duration(policy.renew_interval).total_seconds()
        self._lease_seconds = from_duration(policy.lease_duration).total_seconds()
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
        return self._lease_seconds - self.silent_seconds

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

    def update(self, *, phase: str, step: int | None = None, loss: float = 0.0, tokens_per_second: float = 0.0) -> None:
        """Notes progress for the next renewal."""
        with self._lock:
            self._progress.phase = phase
            if step is not None:
                self._progress.step = step
                self._progress.loss = loss
                self._progress.tokens_per_second = tokens_per_second

    def committed(self, step: int) -> None:
        with self._lock:
            self._progress.committed_step = max(step, self._progress.committed_step)

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
            answer = self._session.renew(self._held, self.progress, timeout=max(5.0, self._interval))
        except _FINAL as error:
            self._lost = error
            self.ended.set()
            return
        except CbtmError as error:
            _log.warning("the lease cannot be renewed now: %s; training goes on", error.message)
            return
        with self._lock:
            # The lease counts from when the coordinator wrote it, which is after it was asked.
            self._renewed = asked
            self._checkpoint |= answer.directive == ws.DIRECTIVE_CHECKPOINT
        if answer.directive == ws.DIRECTIVE_STOP:
            self.stop_reason = answer.reason
            self.stop.set()
