"""Disks that are full: a clear message and a pause, no crash loop; and when there is room again, all goes on by itself.

On a small file system of its own where one may be mounted. Where not, there is no disk to fill, and the tests of single
parts, which inject the error, must do.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.run_fixture import Site, prepare, site, undisturbed
from tests.support.zygote import HASTE_VARIABLE

pytestmark = pytest.mark.integration
_MIB = 1 << 20


@pytest.fixture(autouse=True, scope="module")
def _prepared() -> None:
    prepare()


@contextlib.contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that takes all the room there is."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    return ballast


@pytest.fixture
def here() -> Iterator[Site]:
    with site("full-disk") as made:
        made.environment |= {HASTE_VARIABLE: "1"}
        yield made


def test_a_worker_whose_disk_fills_while_it_trains_says_so_waits_and_goes_on(here: Site) -> None:
    with small_disk(here.cache("small"), 40) as disk:
        here.start_coordinator()
        worker = here.start_worker("small")
        here.until(lambda: here.leased_at_step(3, committed=1), "a first checkpoint")
        ballast = fill(disk)
        here.until(lambda: "waits for room" in worker.output, "the volunteer to be told")
        assert worker.poll() is None
        leases = here.rows("SELECT state, reason FROM leases WHERE state <> 'LIVE'")
        assert all(row["state"] == "RELEASED" for row in leases), [tuple(row) for row in leases]
        ballast.unlink()
        assert worker.wait(60) == 0, here.logs()
        assert "Traceback" not in worker.output
        # A machine whose disk is full is no failure of the task.
        assert here.rows("SELECT id FROM workers WHERE failed_tasks > 0") == []
        here.check_registry()
        assert here.experts() == undisturbed()


def test_a_worker_with_a_full_disk_from_the_start_joins_once_there_is_room_as_one_worker(here: Site) -> None:
    with small_disk(here.cache("small"), 40) as disk:
        here.start_coordinator()
        # Its folder and lock are there; who it is, is not.
        here.start_worker("small", "--max-tasks", "1", faults="worker.register.before=kill@1").wait()
        ballast = fill(disk)
        worker = here.start_worker("small", "--max-tasks", "1")
        here.until(lambda: "is full" in worker.output, "the volunteer to be told")
        assert worker.poll() is None
        ballast.unlink()
        assert worker.wait(60) == 0, here.logs()
        assert "Traceback" not in worker.output
        assert len(here.rows("SELECT id FROM workers")) == 1


def test_an_object_store_whose_disk_fills_says_so_and_its_workers_wait(here: Site) -> None:
    objects = here.data / "objects"
    kept = objects.rename(here.data / "before")
    # 64 MiB are never given to uploads.
    with small_disk(objects, 70) as disk:
        subprocess.run(["cp", "-a", f"{kept}/.", str(disk)], check=True)
        here.start_coordinator()
        worker = here.start_worker("patient")
        here.until(lambda: here.leased_at_step(3), "step 3")
        ballast = fill(disk)
        here.until(lambda: "the disk of the object store" in worker.output, "the volunteer to be told")
        assert (worker.poll(), here.coordinator.poll()) == (None, None)
        ballast.unlink()
        assert worker.wait(60) == 0, here.logs()
        here.check_registry()
        assert here.experts() == undisturbed()
        here.stop_coordinator()
        assert "Traceback" not in here.coordinator.output + worker.output


def test_a_registry_whose_disk_fills_loses_nothing_and_goes_on(here: Site) -> None:
    kept = here.data.rename(here.folder / "before")
    with small_disk(here.data, 80) as disk:
        subprocess.run(["cp", "-a", f"{kept}/.", str(disk)], check=True)
        here.start_coordinator()
        worker = here.start_worker("patient")
        here.until(lambda: here.leased_at_step(3), "step 3")
        ballast = fill(disk)
        here.until(lambda: "database or disk is full" in here.coordinator.output, "the owner to be told")
        assert (worker.poll(), here.coordinator.poll()) == (None, None)
        ballast.unlink()
        assert worker.wait(90) == 0, here.logs()
        here.check_registry()
        assert here.experts() == undisturbed()
        here.stop_coordinator()
        assert "Traceback" not in here.coordinator.output + worker.output
