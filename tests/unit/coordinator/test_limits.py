"""Rates: what a bucket gives, whom an address stands for, and what is refused first."""

from __future__ import annotations

import pytest

from cbtm_common.errors import RateLimited
from cbtm_coordinator.limits import Buckets, Limiter, Rates, address_of

REGISTER = "/cbtm_api.v1.WorkerService/Register"
ISSUE = "/cbtm_api.v1.WorkerService/IssueCredential"
RENEW = "/cbtm_api.v1.WorkerService/RenewLease"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_bucket_gives_a_burst_and_then_its_rate(clock: Clock) -> None:
    buckets = Buckets(2.0, burst_seconds=5.0, clock=clock)
    assert [buckets.take("a") for _ in range(10)] == [0.0] * 10
    assert buckets.take("a") == pytest.approx(0.5)
    assert buckets.take("b") == 0.0, "another's is full"
    clock.now += 0.5
    assert buckets.take("a") == 0.0
    assert buckets.take("a") == pytest.approx(0.5), "asking again costs nothing"
    clock.now += 1e6
    assert [buckets.take("a") for _ in range(11)] == [0.0] * 10 + [pytest.approx(0.5)]


def test_a_rate_of_zero_is_none(clock: Clock) -> None:
    assert not any(Buckets(0.0, clock=clock).take("a") for _ in range(1000))


def test_buckets_stay_few_and_the_one_in_use_is_kept(clock: Clock) -> None:
    buckets = Buckets(1.0, burst_seconds=1.0, clock=clock, most_keys=10)
    for other in range(100):
        buckets.take(f"other{other}")
        if other % 5 == 0:
            buckets.take("a")
    assert buckets.take("a") > 0
    assert len(buckets._known) == 10


@pytest.mark.parametrize("rate", [0.3, 1.0, 3.0, 7.0, 20.0, 33.0])
def test_who_waits_as_long_as_it_is_told_is_served(clock: Clock, rate: float) -> None:
    limiter = Limiter(Rates(anonymous_calls=rate), clock=clock)
    waited = []
    for _ in range(500):
        try:
            limiter.admit(RENEW, "", "192.0.2.1")
        except RateLimited as refused:
            waited.append(refused.message)
            clock.now += float(refused.message.split()[-2])
            limiter.admit(RENEW, "", "192.0.2.1")
    assert len(waited) > 20
    assert not any("wait 0.0 s" in message for message in waited)


def test_who_guesses_credentials_is_stopped_and_nobody_else(clock: Clock) -> None:
    limiter = Limiter(Rates(refusals=1.0), clock=clock)
    for guess in range(10):
        limiter.admit(RENEW, f"Bearer {guess}", "192.0.2.1")
        limiter.refused("192.0.2.1")
    with pytest.raises(RateLimited, match="not good") as refused:
        limiter.admit(RENEW, "Bearer again", "192.0.2.1")
    assert refused.value.retry_after == pytest.approx(1.0)
    limiter.admit(RENEW, "Bearer again", "192.0.2.2")
    clock.now += 1.0
    limiter.admit(RENEW, "Bearer again", "192.0.2.1")


def test_registrations_are_counted_by_address_whatever_the_token(clock: Clock) -> None:
    limiter = Limiter(Rates(registrations=0.01, calls=0.0), clock=clock)
    for number in range(6):
        limiter.admit(REGISTER, f"Bearer {number}", "192.0.2.1")
    with pytest.raises(RateLimited, match="registrations"):
        limiter.admit(REGISTER, "Bearer another", "192.0.2.1")
    limiter.admit(RENEW, "Bearer another", "192.0.2.1")


def test_requests_for_credentials_are_counted_by_address_for_each_is_signed_anew(clock: Clock) -> None:
    limiter = Limiter(Rates(calls=1.0), clock=clock)
    for number in range(10):
        limiter.admit(ISSUE, f"Signature {number}", "192.0.2.1")
    with pytest.raises(RateLimited, match="requests for credentials"):
        limiter.admit(ISSUE, "Signature another", "192.0.2.1")
    limiter.admit(ISSUE, "Signature another", "192.0.2.2")


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.7:50123", "192.0.2.7"),
        ("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:50123", "2001:db8:1:2::/64"),
        ("ipv6:[2001:db8:1:2::9]:50123", "2001:db8:1:2::/64"),
        ("ipv6:%5B::ffff:192.0.2.7%5D:50123", "192.0.2.7"),
        ("ipv6:%5Bfe80::1%25eth0%5D:50123", "fe80::/64"),
        ("unix:/run/cbtm.sock", "unix"),
    ],
)
def test_an_address_is_what_one_caller_has(peer: str, address: str) -> None:
    assert address_of(peer) == address
