"""What takes a lease away, and what must not: a hung device, a wrong clock, a slow link. Real processes."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest

from tests.support.run_fixture import Site, prepare, site, undisturbed
from tests.support.zygote import HASTE_VARIABLE

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True, scope="module")
def _prepared() -> None:
    prepare()


@pytest.fixture
def here() -> Iterator[Site]:
    with site("lease-life") as made:
        yield made
        made.check_registry()


def test_a_worker_that_hangs_while_it_renews_loses_its_lease_and_both_sides_are_told_why(here: Site) -> None:
    here.set_lease(stall_seconds=2.0)
    here.environment |= {HASTE_VARIABLE: "1"}
    here.start_coordinator()
    hung = here.start_worker("hung", step_seconds=600.0)
    here.until(lambda: "hangs" in hung.output, "the volunteer to be told, though the device still hangs")
    assert hung.poll() is None
    (expired,) = here.rows("SELECT * FROM leases")
    assert (expired["state"], expired["step"]) == ("EXPIRED", 0)
    # It renewed to the end: that is not what it lost its lease for.
    assert expired["expire_time"] > expired["end_time"]
    (event,) = here.events("lease.expired")
    assert "hangs" in event.reason
    # It failed, and so waits before it gets another task.
    (worker,) = here.rows("SELECT reason, failed_tasks FROM workers")
    assert worker["failed_tasks"] == 1
    assert "1 failure(s) in a row of this worker" in worker["reason"]
    hung.kill()
    # What it held is done by another, once the task's own back-off is over.
    assert here.start_worker("successor").wait(60) == 0, here.logs()
    assert here.experts() == undisturbed()


def test_clocks_that_are_an_hour_off_change_nothing(here: Site) -> None:
    here.start_coordinator()
    skews = {"early": -3600.0, "late": 3600.0}
    workers = [here.start_worker(name, "--max-tasks", "1", clock_skew=skew) for name, skew in skews.items()]
    for worker in workers:
        assert worker.wait(60) == 0, worker.output
    assert here.experts() == undisturbed()
    leases = here.rows("SELECT state, epoch, acquire_time, end_time FROM leases")
    assert [(row["state"], row["epoch"]) for row in leases] == [("RELEASED", 1)] * 2
    assert here.rows("SELECT id FROM checkpoints WHERE state = 'REJECTED'") == []


def test_a_machine_whose_clock_jumps_while_it_is_away_goes_on_with_its_lease(here: Site) -> None:
    here.start_coordinator()
    worker = here.start_worker("first")
    here.until(lambda: here.leased_at_step(3, committed=1), "a first checkpoint")
    worker.kill()
    again = here.start_worker("again", slot="first", clock_skew=3600.0)
    assert again.wait(60) == 0, again.output
    assert "going on with the task of the former process" in again.output
    assert here.experts() == undisturbed()


def test_an_upload_that_takes_many_times_a_lease_costs_no_lease(here: Site) -> None:
    # About 40 kB of a final checkpoint at 5 kB/s: eight seconds, with leases of two.
    here.set_lease(lease_seconds=2.0, stall_seconds=2.0)
    here.start_coordinator()
    worker = here.start_worker("far away", "--max-tasks", "1", link_speed=5_000.0)
    assert worker.wait(90) == 0, here.logs()
    (lease,) = here.rows("SELECT * FROM leases")
    assert (lease["state"], lease["epoch"]) == ("RELEASED", 1)
    assert lease["transferred_bytes"] > 4 * 2.0 * 4_000
    # What it measured went to the coordinator, and came back as a pace that fits the link.
    assert "from now on: a checkpoint of" in worker.output


@pytest.mark.parametrize("as_json", [False, True])
def test_the_events_of_one_task_are_followed_as_they_come(here: Site, as_json: bool) -> None:
    here.start_coordinator()
    one, other = (status.task.id for status in here.tasks())
    follow = ["events", "--data-dir", str(here.data), "--task", one, "--follow", *(["--json"] if as_json else [])]
    following = here.coord(*follow)
    assert here.start_worker("worker").wait(60) == 0, here.logs()
    here.until(lambda: "task.done" in following.output and "lease.released" in following.output, "the last event")
    following.send(signal.SIGINT)
    assert following.wait() == 0, following.output
    assert other not in following.output
    kinds = [event.kind for event in here.events() if event.task_id == one]
    lines = following.output.splitlines()
    assert len(lines) == len(kinds), "each event once"
    assert all(kind in line for kind, line in zip(kinds, lines, strict=True))
    if as_json:
        assert [json.loads(line)["kind"] for line in lines] == kinds
