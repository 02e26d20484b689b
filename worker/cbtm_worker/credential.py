"""What a worker shows with each call: a short-lived credential, asked for with its key and replaced before it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import datetime

from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import RETRYABLE, Unauthenticated
from cbtm_common.keys import signed_authorization
from cbtm_common.protos import from_duration
from cbtm_worker.identity import Identity

# Replaced once this share of its life is over.
_REPLACE_AT = 2 / 3
# A coordinator that gives no new one now is not asked for it with every call, as long as the old one is good.
_ASK_AGAIN_SECONDS = 10.0


class WorkerCredential:
    """Thread-safe. `issue` makes the call with the `authorization` that it is given.

    Life is counted by the monotonic clock from before the question, so that a wrong wall clock matters only to what is
    signed; the coordinator says its own time when it finds that wrong.
    """

    def __init__(
        self,
        identity: Identity,
        issue: Callable[[str], ws.IssueCredentialResponse],
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._identity = identity
        self._key = bytes.fromhex(identity.private_key)
        self._issue = issue
        self._clock = clock
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._bearer = ""
        self._replace_at = self._end = 0.0
        # What our clock is behind, and the last time that was signed, in microseconds.
        self._behind = self._signed = 0

    def bearer(self) -> str:
        """Raises Unauthenticated when the key is not (or no longer) this worker's, Unavailable when nobody answers."""
        now = self._monotonic()
        if now < self._replace_at:
            return self._bearer
        # Others go on with what is still good while one asks.
        if not self._lock.acquire(blocking=now >= self._end):
            return self._bearer
        try:
            if self._monotonic() >= self._replace_at:
                self._replace()
            return self._bearer
        finally:
            self._lock.release()

    def refused(self, bearer: str) -> bool:
        """Told that the coordinator refused `bearer`; whether another one may help."""
        with self._lock:
            if bearer == self._bearer:
                self._replace_at = self._end = 0.0
        return True

    def _replace(self) -> None:
        started = self._monotonic()
        try:
            answer = self._ask()
        except RETRYABLE:
            if started >= self._end:
                raise
            self._replace_at = min(self._end, started + _ASK_AGAIN_SECONDS)
            return
        life = from_duration(answer.life).total_seconds()
        self._bearer = answer.credential
        self._replace_at, self._end = started + _REPLACE_AT * life, started + life

    def _ask(self) -> ws.IssueCredentialResponse:
        try:
            return self._issue(self._authorization())
        except Unauthenticated as error:
            if "server_time" not in error.metadata:
                raise
            theirs = datetime.fromisoformat(error.metadata["server_time"]).timestamp()
            self._behind = int(1e6 * (theirs - self._clock()))
            # What was refused counts for nothing: it may be of a time far ahead.
            self._signed = int(error.metadata["last_time_us"])
            return self._issue(self._authorization())

    def _authorization(self) -> str:
        # No two are of the same time: each is good for one answer.
        self._signed = max(int(1e6 * self._clock()) + self._behind, self._signed + 1)
        return signed_authorization(self._key, self._identity.worker_id, self._signed)
