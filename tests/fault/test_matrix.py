"""Fails processes at every point of `cbtm_common.faults.POINTS`, by death and by errors, and looks at what remains.

Faults are met in chains: a chain is one run in which one process after the other dies at its point, or in which one
process meets many errors and must go on. For each fault: it fired; after each death and in the end no task had two
leases at one time, and no visible checkpoint lacked an object or had a wrong one; the run completed, and its experts
are bit for bit those of an undisturbed run. A point without a death, or without an error or a reason to have none,
fails here, so that the lists stay complete.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from cbtm_common.faults import POINTS
from tests.support.run_fixture import STEPS, Site, prepare, site, undisturbed
from tests.support.zygote import HASTE_VARIABLE, PART_VARIABLE

pytestmark = pytest.mark.integration

_AT_ONE_TIME = 3
# Of the small checkpoints here, two files are larger.
_PART_BYTES = 16_384
_OLD = 10 * 86_400.0


@dataclass(frozen=True, kw_only=True)
class Chain:
    """`faults` in the order in which they are met; each is POINT=ACTION@PASS."""

    name: str
    run: Callable[[Site, list[str]], None]
    faults: list[str]


# Where an error makes no sense beside a death.
_NO_ERROR = {
    "worker.register.before": "a worker that cannot join says so and leaves",
    "worker.identity.after_write": "nothing can fail between the credential on disk and its first use",
    "worker.release.after": "nothing is left to do",
}


def kills(*faults: str) -> list[str]:
    """From POINT or POINT@PASS."""
    return [f"{name}=kill@{count or 1}" for name, _, count in (fault.partition("@") for fault in faults)]


# Deaths of workers: the same machine comes back each time


def workers_die(here: Site, faults: list[str]) -> None:
    here.start_coordinator()
    for number, fault in enumerate(faults):
        worker = here.start_worker(f"mortal-{number}", slot="mortal", faults=fault)
        assert worker.wait() == -signal.SIGKILL, f"{fault} was never reached\n{here.logs()}"
        here.check_registry()
    assert here.start_worker("mortal again", slot="mortal").wait(90) == 0, here.logs()


# Deaths of coordinators: one worker waits for all of them


def coordinators_die(here: Site, faults: list[str]) -> None:
    first, *rest = faults
    coordinator = here.start_coordinator(faults=first)
    worker = here.start_worker("patient")
    for fault in [*rest, ""]:
        here.until(
            lambda one=coordinator: one.poll() is not None or worker.poll() is not None, f"a death before {fault}"
        )
        assert coordinator.poll() == -signal.SIGKILL, f"one before {fault!r} was never reached\n{here.logs()}"
        here.check_registry()
        coordinator = here.start_coordinator(faults=fault, wait=not fault)
    assert worker.wait(90) == 0, here.logs()


def coordinators_die_keeping_house(here: Site, faults: list[str]) -> None:
    """An object that no row knows, a lease whose worker died, and wrong objects in the way of right ones."""
    stray = plant_litter(here)
    collecting, expiring, discarding = faults[:2], faults[2:4], faults[4:]
    for fault in collecting:
        assert here.start_coordinator(faults=fault, wait=False).wait() == -signal.SIGKILL, f"{fault}\n{here.logs()}"
    here.start_coordinator(faults=expiring[0])
    assert here.start_worker("lost", faults="worker.step.after=kill@3").wait() == -signal.SIGKILL
    for fault in [expiring[1], discarding[0]]:
        assert here.coordinator.wait() == -signal.SIGKILL, f"one before {fault} was never reached\n{here.logs()}"
        here.check_registry()
        here.start_coordinator(faults=fault, wait=not fault)
    successor = here.start_worker("successor")
    for fault in [*discarding[1:], ""]:
        here.until(lambda: here.coordinator.poll() is not None or successor.poll() is not None, "a death")
        assert here.coordinator.poll() == -signal.SIGKILL, f"one before {fault} was never reached\n{here.logs()}"
        here.start_coordinator(faults=fault, wait=not fault)
    assert successor.wait(90) == 0, here.logs()
    assert not stray.exists()


def plant_litter(here: Site) -> Path:
    """An old object of nobody, which it returns, and a wrong one where each task's first final checkpoint will go."""
    objects = here.data / "objects" / "objects"
    (run,) = here.rows("SELECT id FROM runs")
    stray = objects / "runs" / run["id"] / "tasks" / "task_0" / "e00000001" / "s0000000001" / "state.json"
    stray.parent.mkdir(parents=True)
    stray.write_text("of nobody")
    os.utime(stray, (stray.stat().st_mtime - _OLD,) * 2)
    for task in here.rows("SELECT id FROM tasks"):
        wrong = objects / "runs" / run["id"] / "tasks" / task["id"] / "e00000001" / f"s{STEPS:010d}" / "state.json"
        wrong.parent.mkdir(parents=True)
        wrong.write_text("not this")
    here.environment |= {"CBTM_ORPHAN_SECONDS": "0.3"}
    return stray


# Errors: one process meets all of them, and goes on


def a_worker_meets_errors(here: Site, faults: list[str]) -> None:
    here.start_coordinator()
    assert here.start_worker("steadfast", faults=",".join(faults)).wait(120) == 0, here.logs()


def a_coordinator_meets_errors(here: Site, faults: list[str]) -> None:
    stray = plant_litter(here)
    here.start_coordinator(faults=",".join(faults))
    assert here.start_worker("lost", faults="worker.step.after=kill@3").wait() == -signal.SIGKILL, here.logs()
    assert here.start_worker("steadfast").wait(120) == 0, here.logs()
    here.until(lambda: not stray.exists(), "the collection of orphans")


CHAINS = [
    Chain(
        name="worker-joins",
        run=workers_die,
        faults=kills(
            "worker.register.before",
            "worker.register.after",
            "worker.identity.after_write",
            "worker.acquire.before",
            "worker.acquire.after_answer",
            "worker.acquire.after",
            "worker.download.before",
            "transfer.download.before_rename@2",
            "transfer.download.after_rename",
            "worker.download.after",
            "worker.step.after@3",
            "worker.renew.before",
            "worker.renew.after",
        ),
    ),
    Chain(
        name="worker-saves",
        run=workers_die,
        faults=kills(
            "worker.checkpoint.before_write",
            "worker.checkpoint.after_write",
            "worker.checkpoint.after_rename",
            "worker.upload.before_prepare",
            "worker.upload.after_prepare",
            "transfer.upload.before_put@2",
            "transfer.upload.after_put@2",
            "worker.upload.after_file@2",
            "worker.upload.before_commit",
            "worker.upload.after_commit",
            "worker.upload.after_mark",
        ),
    ),
    Chain(
        name="worker-leaves",
        run=workers_die,
        faults=kills(
            "worker.prune.before_rename",
            "worker.prune.after_rename",
            "worker.release.before",
            "worker.release.after_call",
            "worker.release.after",
        ),
    ),
    Chain(
        name="coordinator-leases",
        run=coordinators_die,
        faults=kills(
            "coordinator.register.after_commit",
            "coordinator.acquire.before_commit",
            "coordinator.acquire.after_commit",
            "coordinator.renew.before_commit",
            "coordinator.renew.after_commit",
            "database.commit.before",
            "database.commit.after@2",
            "coordinator.release.before_commit",
            "coordinator.release.after_commit",
        ),
    ),
    Chain(
        name="coordinator-receives",
        run=coordinators_die,
        faults=kills(
            "coordinator.prepare.after_begin",
            "storage.multipart.before_create",
            "storage.multipart.after_create",
            "coordinator.prepare.after_sign",
            "storage.part.before_rename",
            "storage.part.after_rename",
            "storage.put.before_rename",
            "storage.put.before_digest",
            "storage.put.after_rename",
            "storage.multipart.before_complete",
            "storage.multipart.after_complete",
        ),
    ),
    Chain(
        name="coordinator-commits",
        run=coordinators_die,
        faults=kills(
            "coordinator.commit.after_complete",
            "coordinator.commit.after_verify",
            "coordinator.commit.before_commit",
            "coordinator.commit.after_commit",
            "coordinator.prune.before_delete",
            "coordinator.prune.after_delete",
            "coordinator.prune.after_mark",
        ),
    ),
    Chain(
        # Whatever it is that is being written.
        name="coordinator-transactions",
        run=coordinators_die,
        faults=kills(
            *(f"database.commit.{place}@{number}" for number in (2, 4, 6) for place in ("before", "after")),
        ),
    ),
    Chain(
        name="coordinator-keeps-house",
        run=coordinators_die_keeping_house,
        faults=kills(
            "coordinator.orphan.before_delete",
            "coordinator.orphan.after_delete",
            "coordinator.expire.before_commit",
            "coordinator.expire.after_commit",
            "storage.discard.before",
            "storage.discard.after",
        ),
    ),
    Chain(
        name="worker-errors",
        run=a_worker_meets_errors,
        faults=[
            "worker.register.after=full@1",
            "worker.acquire.before=lost@1",
            "worker.acquire.after_answer=lost@1",
            "worker.acquire.after=full@1",
            "worker.renew.before=lost@1",
            "worker.renew.after=io@1",
            "worker.download.before=full@1",
            "transfer.download.before_rename=full@1",
            "transfer.download.after_rename=full@1",
            "worker.download.after=raise@1",
            "worker.step.after=raise@50",
            "worker.checkpoint.before_write=full@1",
            "worker.checkpoint.after_write=full@2",
            "worker.checkpoint.after_rename=raise@2",
            "worker.prune.before_rename=io@1",
            "worker.prune.after_rename=io@1",
            "worker.upload.before_prepare=lost@1",
            "worker.upload.after_prepare=lost@1",
            "transfer.upload.before_put=lost@1",
            "transfer.upload.after_put=lost@1",
            "worker.upload.after_file=lost@1",
            "worker.upload.before_commit=lost@1",
            "worker.upload.after_commit=lost@1",
            "worker.upload.after_mark=io@1",
            "worker.release.before=lost@3",
            "worker.release.after_call=lost@2",
        ],
    ),
    Chain(
        name="coordinator-errors",
        run=a_coordinator_meets_errors,
        faults=[
            "coordinator.register.after_commit=lost@1",
            "coordinator.acquire.before_commit=lost@1",
            "coordinator.acquire.after_commit=lost@2",
            "coordinator.renew.before_commit=lost@1",
            "coordinator.renew.after_commit=lost@2",
            "coordinator.prepare.after_begin=lost@1",
            "coordinator.prepare.after_sign=lost@1",
            "coordinator.commit.after_complete=lost@1",
            "coordinator.commit.after_verify=lost@1",
            "coordinator.commit.before_commit=lost@1",
            "coordinator.commit.after_commit=lost@1",
            "coordinator.release.before_commit=lost@1",
            "coordinator.release.after_commit=lost@1",
            "coordinator.expire.before_commit=lost@1",
            "coordinator.expire.after_commit=raise@1",
            "coordinator.prune.before_delete=raise@1",
            "coordinator.prune.after_delete=io@1",
            "coordinator.prune.after_mark=raise@1",
            "coordinator.orphan.before_delete=io@1",
            "coordinator.orphan.after_delete=raise@1",
            "storage.put.before_rename=full@1",
            "storage.put.before_digest=io@1",
            "storage.put.after_rename=full@1",
            "storage.part.before_rename=io@1",
            "storage.part.after_rename=full@1",
            "storage.multipart.before_create=lost@1",
            "storage.multipart.after_create=lost@1",
            "storage.multipart.before_complete=lost@1",
            "storage.multipart.after_complete=full@1",
            "storage.discard.before=lost@1",
            "storage.discard.after=lost@1",
            "database.commit.before=lost@7",
            "database.commit.after=lost@9",
        ],
    ),
]


@pytest.fixture(scope="module")
def outcomes() -> Iterator[dict[str, Future[set[str]]]]:
    """Of each chain: the faults that fired. A few run at one time; a test waits for its own."""
    prepare()
    with ThreadPoolExecutor(_AT_ONE_TIME) as pool:
        yield {chain.name: pool.submit(outcome, chain) for chain in CHAINS}


@pytest.mark.parametrize(
    ("chain", "fault"), [pytest.param(chain.name, fault, id=fault) for chain in CHAINS for fault in chain.faults]
)
@pytest.mark.timeout(600)
def test_a_process_that_fails_here_costs_nothing_but_time(
    chain: str, fault: str, outcomes: dict[str, Future[set[str]]]
) -> None:
    assert fault in outcomes[chain].result()


def test_every_point_is_met_by_a_death_and_by_an_error() -> None:
    met = [fault.partition("@")[0].split("=") for chain in CHAINS for fault in chain.faults]
    assert {name for name, action in met if action == "kill"} == set(POINTS)
    assert {name for name, action in met if action != "kill"} | set(_NO_ERROR) == set(POINTS)


def outcome(chain: Chain) -> set[str]:
    """The faults that fired. Raises AssertionError where anything is not as it should be."""
    with site(chain.name) as here:
        here.environment |= {PART_VARIABLE: str(_PART_BYTES), HASTE_VARIABLE: "1"}
        here.set_lease(checkpoint_seconds=0.3)
        chain.run(here, chain.faults)
        assert here.is_complete(), here.logs()
        # What is superseded is deleted behind the workers' backs; after that, all is at rest.
        here.until(lambda: not _to_be_deleted(here), "the deletion of superseded checkpoints")
        here.check_registry()
        assert here.experts() == undisturbed(), here.logs()
        said = "\n".join(child.output for child in here.children)
        return set(re.findall(r"^fault: (\S+)$", said, re.MULTILINE))


def _to_be_deleted(here: Site) -> bool:
    undone = "state IN ('COMMITTED', 'UPLOADING') OR (state IN ('PRUNED', 'REJECTED') AND NOT objects_deleted)"
    return bool(here.rows(f"SELECT id FROM checkpoints WHERE {undone}"))
