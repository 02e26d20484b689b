"""The folder of one task's checkpoints: what counts as whole, what is kept, what is swept away."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import cbtm_worker.train
from cbtm_common.errors import IntegrityError
from cbtm_worker.local import LocalCheckpoints, drop_other_tasks


def make(folder: Path, step: int, *, committed: bool = False) -> Path:
    directory = LocalCheckpoints(folder).path(step)
    (directory / "model").mkdir(parents=True)
    (directory / "state.json").write_text("{}")
    if committed:
        LocalCheckpoints(folder).mark_committed(step)
    return directory


def steps(folder: Path) -> list[int]:
    return [c.step for c in LocalCheckpoints(folder).all()]


def test_whole_checkpoints_are_found_newest_first(tmp_path: Path) -> None:
    make(tmp_path, 5, committed=True)
    make(tmp_path, 120)
    (tmp_path / "base").mkdir()
    (tmp_path / "sources").mkdir()
    (tmp_path / ".s0000000130.ab.partial").mkdir()
    found = LocalCheckpoints(tmp_path).all()
    assert [(c.step, c.committed) for c in found] == [(120, False), (5, True)]
    assert LocalCheckpoints(tmp_path).committed_step == 5


def test_nothing_is_there_before_the_first(tmp_path: Path) -> None:
    local = LocalCheckpoints(tmp_path / "task")
    assert local.all() == []
    assert local.committed_step == 0
    local.prune([3])
    local.sweep()
    local.clear()


def test_pruning_keeps_the_last_committed_what_is_needed_and_what_is_newer(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        make(tmp_path, step, committed=step in (1, 2))
    LocalCheckpoints(tmp_path).prune([4])
    assert steps(tmp_path) == [5, 4, 2]
    assert not LocalCheckpoints(tmp_path).path(1).with_suffix(".done").exists()


def test_what_a_crash_left_half_done_is_swept_away(tmp_path: Path) -> None:
    make(tmp_path, 1)
    (tmp_path / ".s0000000002.ab.partial" / "model").mkdir(parents=True)
    LocalCheckpoints(tmp_path).sweep()
    assert [p.name for p in tmp_path.iterdir()] == ["s0000000001"]


def test_a_checkpoint_of_another_task_or_step_or_an_unreadable_one_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3, 4):
        make(tmp_path, step)

    def read_state(directory: Path) -> SimpleNamespace:
        step = int(directory.name[1:])
        if step == 4:
            raise IntegrityError("no state")
        return SimpleNamespace(task_id="task_9" if step == 3 else "task_1", step=7 if step == 2 else step)

    monkeypatch.setitem(cbtm_worker.train.__dict__, "read_state", read_state)
    newest = LocalCheckpoints(tmp_path).newest("task_1")
    assert newest is not None
    assert newest.step == 1
    assert steps(tmp_path) == [1]


def test_other_tasks_are_dropped_when_handed_in_and_kept_for_a_day_when_not(tmp_path: Path) -> None:
    for name, committed in (("mine", False), ("sent", True), ("unsent", False), ("old", False)):
        make(tmp_path / name, 4, committed=committed)
    (tmp_path / "empty").mkdir()
    written = (tmp_path / "unsent" / "s0000000004").stat().st_mtime
    os.utime(tmp_path / "old" / "s0000000004", (written - 90_000, written - 90_000))

    drop_other_tasks(tmp_path, keep="mine", now=written + 10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "unsent"]

    drop_other_tasks(tmp_path, keep="mine", now=written + 10, all_of_them=True)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
