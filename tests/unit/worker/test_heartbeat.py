"""The heartbeat: what renewals carry, what their answers do, and what ends a lease."""

from __future__ import annotations

from typing import Any

import pytest

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import (
    CbtmError,
    InternalError,
    LeaseLost,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from cbtm_common.protos import duration
from cbtm_worker.heartbeat import Heartbeat
from tests.support.fake_coordinator import HELD, FakeSession


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(
    session: FakeSession, clock: Clock | None = None, *, renew: float = 10.0, said: list[str] | None = None
) -> Heartbeat:
    policy = pb.LeasePolicy(
        lease_duration=duration(60.0), renew_interval=duration(renew), checkpoint_interval=duration(600.0)
    )
    options: dict[str, Any] = {"clock": clock} if clock else {}
    options |= {} if said is None else {"say": said.append}
    return Heartbeat(session, HELD, policy, committed_step=7, **options)  # type: ignore[arg-type]


def test_a_renewal_carries_what_was_noted_last() -> None:
    session = FakeSession()
    heartbeat = make(session)
    heartbeat.update(phase="train", step=12, loss=3.5, tokens_per_second=100.0)
    heartbeat.moved(5)
    heartbeat.moved(6)
    heartbeat.committed(10)
    heartbeat.committed(9)
    heartbeat.beat()
    heartbeat.update(phase="upload")
    heartbeat.beat()
    first, second = session.arguments("renew")
    assert (first.phase, first.step, first.loss, first.tokens_per_second) == ("train", 12, 3.5, 100.0)
    assert (first.committed_step, first.transferred_bytes) == (10, 11)
    assert (second.phase, second.step, second.loss) == ("upload", 12, 3.5)


def test_before_any_step_the_step_is_that_of_the_checkpoint_gone_on_from() -> None:
    session = FakeSession()
    make(session).beat()
    assert session.arguments("renew")[0].step == 7


def test_a_request_for_a_checkpoint_is_passed_on_once() -> None:
    session = FakeSession()
    session.answers["renew"].append(ws.RenewLeaseResponse(directive=ws.DIRECTIVE_CHECKPOINT))
    heartbeat = make(session)
    assert not heartbeat.take_checkpoint_request()
    heartbeat.beat()
    heartbeat.beat()
    assert heartbeat.take_checkpoint_request()
    assert not heartbeat.take_checkpoint_request()


def test_being_told_to_stop_is_passed_on_with_the_reason_and_keeps_the_lease() -> None:
    session = FakeSession()
    session.answers["renew"].append(ws.RenewLeaseResponse(directive=ws.DIRECTIVE_STOP, reason="paused"))
    heartbeat = make(session)
    heartbeat.beat()
    assert heartbeat.stop.is_set()
    assert heartbeat.stop_reason == "paused"
    assert not heartbeat.ended.is_set()
    heartbeat.check()


@pytest.mark.parametrize("error", [LeaseLost, NotFound, PermissionDenied, Unauthenticated])
def test_only_the_coordinators_own_word_ends_the_lease(error: type[CbtmError]) -> None:
    session = FakeSession()
    session.answers["renew"].append(error("it is over"))
    heartbeat = make(session)
    heartbeat.beat()
    assert heartbeat.ended.is_set()
    with pytest.raises(error, match="it is over"):
        heartbeat.check()


@pytest.mark.parametrize("error", [Unavailable, InternalError])
def test_a_coordinator_that_does_not_answer_ends_nothing(error: type[CbtmError]) -> None:
    session = FakeSession()
    session.answers["renew"] += [error("away")] * 3
    heartbeat = make(session)
    for _ in range(4):
        heartbeat.beat()
    assert not heartbeat.ended.is_set()
    heartbeat.check()


def test_the_lease_is_counted_from_when_its_renewal_was_asked_for() -> None:
    session, clock = FakeSession(), Clock()
    heartbeat = make(session, clock)
    assert heartbeat.seconds_left == 60

    def slow() -> None:
        clock.now += 4

    session.answers["renew"].append(slow)
    clock.now += 20
    heartbeat.beat()
    assert heartbeat.seconds_left == 56
    assert not heartbeat.is_cut_off


def test_renewals_that_go_unanswered_count_against_the_lease() -> None:
    session, clock = FakeSession(), Clock()
    session.answers["renew"] += [Unavailable("away")] * 2
    heartbeat = make(session, clock)
    for _ in range(2):
        clock.now += 15
        heartbeat.beat()
    assert heartbeat.seconds_left == 30
    assert heartbeat.is_cut_off
    heartbeat.beat()
    assert heartbeat.seconds_left == 60
    assert not heartbeat.is_cut_off


def test_it_renews_by_itself_until_closed() -> None:
    session = FakeSession()
    heartbeat = make(session, renew=0.01)
    heartbeat.start()
    session.wait_for_calls("renew", 3)
    heartbeat.close()
    done = len(session.arguments("renew"))
    assert not heartbeat.ended.wait(0.05)
    assert len(session.arguments("renew")) == done


def test_it_stops_renewing_a_lease_that_is_lost() -> None:
    session = FakeSession()
    session.answers["renew"].append(LeaseLost("it is REVOKED"))
    heartbeat = make(session, renew=0.01)
    heartbeat.start()
    assert heartbeat.ended.wait(10)
    heartbeat.close()
    assert len(session.arguments("renew")) == 1


def test_what_was_measured_goes_along_and_the_pace_that_comes_back_holds_until_it_is_taken_back() -> None:
    session, clock = FakeSession(), Clock()
    said: list[str] = []
    heartbeat = make(session, clock, said=said)
    heartbeat.update(phase="train", step=8, step_seconds=5.0)
    heartbeat.uploads(checkpoint_bytes=80_000, bytes_per_second=0.0)
    heartbeat.uploads(checkpoint_bytes=0, bytes_per_second=16.0)
    slower = pb.LeasePolicy(
        lease_duration=duration(250.0), checkpoint_interval=duration(10_000.0), reason="a step takes 5 s"
    )

    def slow() -> None:
        clock.now += 3

    session.answers["renew"] += [ws.RenewLeaseResponse(policy=slower), slow]
    heartbeat.beat()
    assert (heartbeat.seconds_left, heartbeat.checkpoint_seconds) == (250.0, 10_000.0)
    assert said == ["a checkpoint every 10000 s from now on: a step takes 5 s"]
    heartbeat.beat()
    assert (heartbeat.seconds_left, heartbeat.checkpoint_seconds) == (57.0, 600.0)
    heartbeat.beat()
    first, _, third = session.arguments("renew")
    assert (first.step_seconds, first.checkpoint_bytes, first.upload_bytes_per_second) == (5.0, 80_000, 16.0)
    assert (first.renew_seconds, third.renew_seconds) == (0.0, 3.0)


def test_what_ends_the_lease_is_said_at_once_though_the_device_may_hang() -> None:
    session = FakeSession()
    said: list[str] = []
    session.answers["renew"].append(LeaseLost("it is EXPIRED: renewed, but without a step: the worker hangs"))
    make(session, said=said).beat()
    assert said == ["the lease is over: it is EXPIRED: renewed, but without a step: the worker hangs"]
