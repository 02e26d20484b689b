"""How often one caller may call: token buckets by credential and by address, in the memory of one process.

With N coordinators behind one address a caller so has N times its rate, which bounds a flood just as well. What must
hold over all of them, leases held and bytes to come, is counted in the registry. A caller over its rate is told how
long to wait; one that does not wait is let wait for the refusal itself, which costs the event loop nothing.
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote

from cbtm_common.errors import RateLimited

# Tokens of a bucket that was left alone, in seconds of its rate.
_BURST_SECONDS = 10.0
# Registrations come together: a cluster's machines are started at once, behind one address.
_REGISTRATION_BURST_SECONDS = 600.0
_MOST_KEYS = 100_000
# Of a token: what sums of seconds times rates are off by, and less.
_ROUNDING = 1e-9
# Waits are told in tenths of a second, rounded up.
_WAITS_PER_SECOND = 10
# Of a checkpoint: weights in float32 and AdamW's two moments are 12 bytes a parameter.
_STATE_BYTES = 16
_SLACK_BYTES = 64 << 20


class Buckets:
    """A token bucket for each key. `per_second` 0: no limit. The keys longest unused are forgotten."""

    def __init__(
        self,
        per_second: float,
        *,
        burst_seconds: float = _BURST_SECONDS,
        clock: Callable[[], float] = time.monotonic,
        most_keys: int = _MOST_KEYS,
    ) -> None:
        self._per_second = per_second
        self._burst = max(1.0, per_second * burst_seconds)
        self._clock = clock
        self._most_keys = most_keys
        # (tokens, when there were so many)
        self._known: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, key: str) -> float:
        """Seconds until there is a token; 0 when there is one."""
        if not self._per_second:
            return 0.0
        missing = 1.0 - self._tokens(key)
        return missing / self._per_second if missing > _ROUNDING else 0.0

    def take(self, key: str) -> float:
        """Takes a token when there is one; `wait`, as it was before."""
        wait = self.wait(key)
        if self._per_second and not wait:
            self._known[key] = (self._tokens(key) - 1.0, self._clock())
            self._known.move_to_end(key)
            if len(self._known) > self._most_keys:
                self._known.popitem(last=False)
        return wait

    def _tokens(self, key: str) -> float:
        tokens, since = self._known.get(key, (self._burst, -math.inf))
        return min(self._burst, tokens + (self._clock() - since) * self._per_second)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """A second, each 0 for no limit."""

    # Of one credential.
    calls: float = 50.0
    # Of one address, without a credential.
    anonymous_calls: float = 20.0
    # Of one address, with a credential that is not good.
    refusals: float = 5.0
    registrations: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """Of one worker, over all coordinators; each 0 for no limit."""

    # Live at once. One that comes back after a crash takes another before its old one ends.
    leases: int = 4
    # Checkpoints begun and not committed, of one run, counted by the bytes that a large one of it would have.
    uploads: int = 8

    def upload_bytes(self, model_parameters: int) -> int:
        """That a worker may have on the way in a run of such a model."""
        return self.uploads * (_STATE_BYTES * model_parameters + _SLACK_BYTES)


class Limiter:
    """Admits calls or raises RateLimited. Not thread-safe: it belongs to the event loop."""

    def __init__(self, rates: Rates, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._calls = Buckets(rates.calls, clock=clock)
        self._anonymous = Buckets(rates.anonymous_calls, clock=clock)
        self._refusals = Buckets(rates.refusals, clock=clock)
        self._registrations = Buckets(rates.registrations, burst_seconds=_REGISTRATION_BURST_SECONDS, clock=clock)

    def admit(self, method: str, caller: str, address: str) -> None:
        """Counts a call of `caller`, before its credential is looked up; empty for a call without one.

        What asks for a credential is signed anew each time, which would make each a caller of its own: those are
        counted by address.
        """
        if caller:
            # Whoever guesses is stopped before the registry is asked.
            _check(self._refusals.wait(address), "calls with a credential that is not good", address)
            if method.endswith("/IssueCredential"):
                _check(self._calls.take(f"signed from {address}"), "requests for credentials", address)
            else:
                _check(self._calls.take(hashlib.sha256(caller.encode()).hexdigest()), "calls", "this caller")
        else:
            _check(self._anonymous.take(address), "calls without a token", address)
        if method.endswith("/Register"):
            _check(self._registrations.take(address), "registrations", address)

    def refused(self, address: str) -> None:
        """The credential of an admitted call was not good."""
        self._refusals.take(address)


def _check(wait: float, what: str, whose: str) -> None:
    if wait:
        # Whoever waits as long as it is told is served.
        told = math.ceil(wait * _WAITS_PER_SECOND) / _WAITS_PER_SECOND
        raise RateLimited(f"too many {what} from {whose}; wait {told:.1f} s", retry_after=told)


def address_of(peer: str) -> str:
    """Whom gRPC's name of a peer belongs to: an IPv4 address, or the /64 that one IPv6 host may choose from."""
    kind, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]")
    if kind == "ipv4":
        return host
    if kind == "ipv6":
        return network_of(host)
    # A Unix socket, which is no address.
    return kind


def network_of(host: str) -> str:
    """An address as it is counted: IPv6 by its /64."""
    found = ipaddress.ip_address(host.partition("%")[0])
    if found.version == 4:
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, 64), strict=False))
