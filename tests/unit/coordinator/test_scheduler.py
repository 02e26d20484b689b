"""Decisions of the scheduler: each with its reason, none with a clock of its own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbtm_common.recipe import LeaseRecipe
from cbtm_coordinator.scheduler import (
    Directive,
    DirectiveDecision,
    Measured,
    backoff,
    expiry_reason,
    lease_directive,
    pace,
    poll_after,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
BOUNDS = LeaseRecipe()
BEGIN = pace(BOUNDS, Measured())


def _told(
    *, paused: bool = False, training: bool = True, step: int = 50, committed: int = 10, since: timedelta = MINUTE
) -> DirectiveDecision:
    return lease_directive(
        now=NOW,
        run_paused=paused,
        training=training,
        step=step,
        committed_step=committed,
        last_checkpoint=NOW - since,
        pace=BEGIN,
    )


def test_a_worker_on_time_goes_on_without_a_reason() -> None:
    assert _told() == DirectiveDecision(directive=Directive.CONTINUE, reason="", pace=BEGIN)


def test_a_paused_run_stops_its_workers_also_when_a_checkpoint_is_late() -> None:
    told = _told(paused=True, since=60 * MINUTE)
    assert told.directive is Directive.STOP
    assert "paused" in told.reason


def test_a_late_checkpoint_is_asked_for_and_says_how_much_is_at_risk() -> None:
    told = _told(since=21 * MINUTE)
    assert told.directive is Directive.CHECKPOINT
    assert "1260 s" in told.reason
    assert "40 steps" in told.reason


@pytest.mark.parametrize("still", [{"training": False}, {"step": 10}])
def test_no_checkpoint_is_asked_for_while_bytes_move_or_nothing_is_new(still: dict[str, bool | int]) -> None:
    assert _told(since=60 * MINUTE, **still).directive is Directive.CONTINUE  # type: ignore[arg-type]


def test_backoff_doubles_and_is_bounded() -> None:
    waits = []
    for failures in range(1, 30):
        until = backoff(now=NOW, failures=failures, what="this task").until
        assert until is not None
        waits.append(until - NOW)
    assert waits[:3] == [timedelta(seconds=15), timedelta(seconds=30), timedelta(seconds=60)]
    assert waits == sorted(waits)
    assert waits[-1] == 30 * MINUTE


def test_no_failure_means_no_wait() -> None:
    decision = backoff(now=NOW, failures=0, what="this task")
    assert (decision.until, decision.reason) == (None, "")


def test_a_live_lease_that_is_renewed_and_moves_is_left_alone() -> None:
    assert expiry_reason(now=NOW, expire_time=NOW + MINUTE, stall_time=NOW + MINUTE) is None


def test_a_silent_worker_and_a_hung_one_lose_their_leases_for_different_reasons() -> None:
    silent = expiry_reason(now=NOW, expire_time=NOW - MINUTE, stall_time=NOW + MINUTE)
    hung = expiry_reason(now=NOW, expire_time=NOW + MINUTE, stall_time=NOW)
    assert silent is not None
    assert "not renewed" in silent
    assert "60 s" in silent
    assert hung is not None
    assert "hangs" in hung


def test_a_lease_begins_as_the_run_says_and_stays_so_on_a_fast_machine() -> None:
    fast = Measured(step_seconds=0.5, upload_bytes_per_second=100e6, checkpoint_bytes=1_500_000_000, renew_seconds=0.02)
    assert pace(BOUNDS, fast) == BEGIN
    assert (BEGIN.lease, BEGIN.checkpoint, BEGIN.patience) == (2 * MINUTE, 10 * MINUTE, 10 * MINUTE)
    assert BEGIN.reason == ""


def test_eighty_gigabytes_over_a_slow_link_get_a_longer_lease_fewer_checkpoints_and_more_patience() -> None:
    sized = pace(BOUNDS, Measured(step_seconds=5, upload_bytes_per_second=16e6, checkpoint_bytes=80_000_000_000))
    assert sized.lease == timedelta(seconds=250)
    # 5,000 s to send; half of the time at most goes by sending.
    assert sized.checkpoint == timedelta(seconds=10_000)
    # Reading 80 GB back moves no byte that the worker sees.
    assert sized.patience == timedelta(seconds=3200)
    assert sized.reason == "a checkpoint of 80 GB takes 5000 s to send, a step takes 5 s"


def test_a_slow_device_gets_time_for_some_steps_between_checkpoints_and_is_not_taken_to_hang() -> None:
    sized = pace(BOUNDS, Measured(step_seconds=600))
    assert sized.checkpoint == timedelta(seconds=2400)
    assert sized.patience == timedelta(seconds=6000)
    assert sized.lease == BEGIN.lease


def test_a_link_so_full_that_renewals_are_slow_gets_a_longer_lease() -> None:
    sized = pace(BOUNDS, Measured(renew_seconds=45))
    assert sized.lease == timedelta(seconds=225)
    assert sized.reason == "a renewal took 45 s"


@given(
    st.builds(
        Measured,
        step_seconds=st.floats(),
        upload_bytes_per_second=st.floats(),
        checkpoint_bytes=st.integers(-(2**63), 2**63 - 1),
        renew_seconds=st.floats(),
    )
)
def test_whatever_a_worker_says_of_itself_the_bounds_of_the_run_hold(measured: Measured) -> None:
    sized = pace(BOUNDS, measured)
    assert 2 * MINUTE <= sized.lease <= timedelta(seconds=BOUNDS.max_lease_seconds)
    assert 10 * MINUTE <= sized.checkpoint <= timedelta(seconds=BOUNDS.max_checkpoint_seconds)
    assert 10 * MINUTE <= sized.patience <= timedelta(seconds=BOUNDS.max_stall_seconds)


def test_a_run_whose_least_is_above_its_most_gets_its_least() -> None:
    sized = pace(LeaseRecipe(lease_seconds=3600), Measured(renew_seconds=1e6))
    assert sized.lease == HOUR


def test_an_idle_worker_asks_soon_while_work_may_come_free() -> None:
    assert poll_after(open_tasks=3) == timedelta(seconds=10)
    assert poll_after(open_tasks=3, renew=timedelta(seconds=0.5)) == timedelta(seconds=2)
    assert poll_after(open_tasks=0) == MINUTE
