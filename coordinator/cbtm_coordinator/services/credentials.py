"""Short-lived credentials of workers: a statement of ours, with a MAC, that nothing needs to be looked up for.

A credential names the worker, the key with which it was asked for, and its end. Whoever steals it has it until then and
no longer; a worker that gets another key, or is revoked, is refused before (`auth`).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cbtm_common.errors import Unauthenticated

_PREFIX = "cbtm_session_"


@dataclass(frozen=True, kw_only=True)
class Claims:
    worker_id: str
    key_id: str
    expire_time: datetime


class Credentials:
    """`secret_key` is the root of this coordinator's secrets; `life` that of a credential."""

    def __init__(
        self, secret_key: bytes, *, clock: Callable[[], datetime], life: timedelta = timedelta(minutes=15)
    ) -> None:
        self.life = life
        self._secret_key = secret_key
        self._clock = clock

    def issue(self, worker_id: str, key_id: str) -> str:
        said = f"{worker_id}.{key_id}.{int((self._clock() + self.life).timestamp())}"
        return f"{_PREFIX}{said}.{self._mac(said)}"

    def is_one(self, secret: str) -> bool:
        return secret.startswith(_PREFIX)

    def read(self, credential: str) -> Claims:
        """Raises Unauthenticated for one that is not ours, or whose time is over."""
        said, _, mac = credential.removeprefix(_PREFIX).rpartition(".")
        if not hmac.compare_digest(mac.encode(), self._mac(said).encode()):
            raise Unauthenticated("this credential is not of this coordinator; ask for another one with the key")
        # From here on the words are our own.
        worker_id, key_id, expires = said.split(".")
        claims = Claims(worker_id=worker_id, key_id=key_id, expire_time=datetime.fromtimestamp(int(expires), UTC))
        if self._clock() >= claims.expire_time:
            raise Unauthenticated("this credential has expired; ask for another one with the key")
        return claims

    def _mac(self, said: str) -> str:
        return hmac.new(self._secret_key, f"cbtm-session-1\n{said}".encode(), hashlib.sha256).hexdigest()
