"""Kills a process at every point of `cbtm_common.faults.POINTS`, starts it again, and looks at what became of the run.

For each point: the fault fired; the run completed; its experts are bit for bit those of an undisturbed run; no task had
two leases at one time; no visible checkpoint lacked an object or had a wrong one, neither right after the fault nor in
the end. A point without a scenario fails here, so that the list stays complete.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from cbtm_common.faults import POINTS
from tests.support.run_fixture import STEPS, Site, prepare, site, undisturbed

pytestmark = pytest.mark.integration

_AT_ONE_TIME = 3
# Which pass kills, where the first is not the most telling one.
_PASS = {
    # After the first checkpoint, some steps into the next.
    "worker.step.after": STEPS - 4,
    # In the middle of a checkpoint's files.
    "worker.upload.after_file": 2,
    "storage.put.before_rename": 3,
    "storage.put.after_rename": 3,
    "coordinator.renew.after_commit": 2,
}


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, Future[None]]]:
    """Of each point: what its scenario comes to. A few run at one time; a test waits for its own."""
    prepare()
    with ThreadPoolExecutor(_AT_ONE_TIME) as pool:
        yield {name: pool.submit(scenario, name) for name in POINTS}


@pytest.mark.parametrize("name", list(POINTS))
@pytest.mark.timeout(600)
def test_a_process_killed_here_costs_nothing_but_time(name: str, outcomes: dict[str, Future[None]]) -> None:
    outcomes[name].result()


def scenario(name: str) -> None:
    """Raises AssertionError where anything is not as it should be."""
    fault = f"{name}=kill@{_PASS.get(name, 1)}"
    with site(name.replace(".", "-")) as here:
        if name.startswith("worker."):
            _worker_dies(here, fault)
        elif name.startswith("coordinator.expire."):
            _coordinator_dies_expiring(here, fault)
        else:
            _coordinator_dies(here, fault)
        assert here.is_complete(), here.logs()
        # What is superseded is deleted behind the workers' backs; after that, all is at rest.
        here.until(lambda: not _to_be_deleted(here), "the deletion of superseded checkpoints")
        here.check_registry()
        assert here.experts() == undisturbed()


def _worker_dies(here: Site, fault: str) -> None:
    here.start_coordinator()
    worker = here.start_worker("mortal", faults=fault)
    assert worker.wait() == -signal.SIGKILL, f"{fault} was never reached\n{worker.output}"
    here.check_registry()
    again = here.start_worker("mortal again", slot="mortal")
    assert again.wait() == 0, here.logs()


def _coordinator_dies(here: Site, fault: str) -> None:
    coordinator = here.start_coordinator(faults=fault)
    worker = here.start_worker("patient")
    assert coordinator.wait() == -signal.SIGKILL, f"{fault} was never reached\n{here.logs()}"
    here.check_registry()
    here.start_coordinator()
    assert worker.wait() == 0, here.logs()


def _coordinator_dies_expiring(here: Site, fault: str) -> None:
    """A worker dies first, so that there is a lease to expire; another, patient one takes its task over."""
    coordinator = here.start_coordinator(faults=fault)
    lost = here.start_worker("lost", faults="worker.step.after=kill@3")
    assert lost.wait() == -signal.SIGKILL, lost.output
    assert coordinator.wait() == -signal.SIGKILL, f"{fault} was never reached\n{here.logs()}"
    here.check_registry()
    here.start_coordinator()
    successor = here.start_worker("successor")
    assert successor.wait() == 0, here.logs()


def _to_be_deleted(here: Site) -> bool:
    undone = "state IN ('COMMITTED', 'UPLOADING') OR (state IN ('PRUNED', 'REJECTED') AND NOT objects_deleted)"
    return bool(here.rows(f"SELECT id FROM checkpoints WHERE {undone}"))
