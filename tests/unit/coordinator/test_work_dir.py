"""Folders of commands that were killed are removed by the next, those of live ones never."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cbtm_common.errors import InvalidArgument, ResourceExhausted
from cbtm_coordinator.work_dir import remove_abandoned, work_dir

_OTHER = """
import sys
from pathlib import Path
from cbtm_coordinator.work_dir import work_dir
with work_dir(Path(sys.argv[1])) as folder:
    (folder / "shards").mkdir()
    (folder / "shards" / "spool").write_bytes(bytes(5000))
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process in the middle of its work, and its folder."""
    command = [sys.executable, "-c", _OTHER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def test_the_folder_is_there_alone_for_its_owner_and_gone_afterwards(tmp_path: Path) -> None:
    with work_dir(tmp_path / "new") as folder, work_dir(tmp_path / "new") as second:
        assert folder != second
        assert folder.parent == tmp_path / "new"
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "file").write_text("x")
    assert list((tmp_path / "new").iterdir()) == []


def test_the_folder_is_gone_after_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), work_dir(tmp_path) as folder:
        (folder / "none").read_text()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_a_live_one_has_is_not(
    tmp_path: Path, other: tuple[subprocess.Popen[str], Path]
) -> None:
    process, folder = other
    assert remove_abandoned(tmp_path) == 0
    assert (folder / "shards" / "spool").exists()
    process.kill()
    process.wait()
    assert (folder / "shards" / "spool").exists()
    assert remove_abandoned(tmp_path) == 5000
    assert list(tmp_path.iterdir()) == []


def test_only_what_has_a_lock_of_ours_is_removed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "cbtm-run-without-lock").mkdir()
    (tmp_path / "cbtm-run-link.lock").symlink_to(tmp_path / "kept")
    (tmp_path / "cbtm-run-aside.lock").touch()
    (tmp_path / "cbtm-run-aside").symlink_to(tmp_path / "kept")
    before = sorted(tmp_path.iterdir())
    assert remove_abandoned(tmp_path) == 0
    assert sorted(tmp_path.iterdir()) == before


def test_a_lock_that_was_taken_for_free_before_it_was_held_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, calls = fcntl.flock, 0

    def late(descriptor: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            remove_abandoned(tmp_path)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with work_dir(tmp_path) as folder:
        assert remove_abandoned(tmp_path) == 0
        assert folder.exists()
        assert folder.with_suffix(".lock").exists()


def test_another_users_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cbtm-run-theirs.lock").touch()
    (tmp_path / "cbtm-run-theirs").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    remove_abandoned(tmp_path)
    assert (tmp_path / "cbtm-run-theirs").is_dir()


def test_a_place_where_no_folder_can_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(InvalidArgument, match=r"work-dir: no folder can be made in .*/file"),
        work_dir(tmp_path / "file"),
    ):
        pass


def test_a_full_disk_is_named_with_the_option_that_names_another(tmp_path: Path) -> None:
    with pytest.raises(ResourceExhausted, match=r"work-dir: the disk of .* is full.*--work-dir"), work_dir(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
