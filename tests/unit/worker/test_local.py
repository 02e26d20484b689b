"""Checkpoints of a task on this disk, and the small parts beside them."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cbtm_worker.train
from cbtm_common.errors import IntegrityError, InvalidArgument
from cbtm_worker.inputs import check_model, disk_refusal
from cbtm_worker.local import LocalCheckpoints, drop_other_tasks
from cbtm_worker.waiting import AnyOf


def put(local: LocalCheckpoints, *steps: int, task_id: str = "task_1") -> None:
    for step in steps:
        local.path(step).mkdir(parents=True)
        (local.path(step) / "state.json").write_text(json.dumps([task_id, step]))


def steps(local: LocalCheckpoints) -> list[int]:
    return [checkpoint.step for checkpoint in local.all()]


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalCheckpoints:
    def read_state(directory: Path) -> Any:
        try:
            task_id, step = json.loads((directory / "state.json").read_text())
        except ValueError as error:
            raise IntegrityError("damaged") from error
        return SimpleNamespace(task_id=task_id, step=step)

    # Into the dictionary: an attribute that is not there yet would import torch.
    monkeypatch.setitem(cbtm_worker.train.__dict__, "read_state", read_state)
    return LocalCheckpoints(tmp_path / "task_1")


def test_the_newest_comes_first_and_what_is_half_written_does_not_count(local: LocalCheckpoints) -> None:
    put(local, 5, 20, 10)
    (local.folder / ".s0000000030.abcd.partial").mkdir()
    (local.folder / "base").mkdir()
    (local.folder / "s-notes").mkdir()
    assert steps(local) == [20, 10, 5]
    local.sweep()
    assert sorted(p.name for p in local.folder.iterdir() if p.name.startswith(".")) == []


def test_a_folder_that_is_not_there_is_empty(local: LocalCheckpoints) -> None:
    assert local.all() == []
    assert local.committed_step == 0
    assert local.newest("task_1") is None
    local.sweep()
    local.clear()


def test_what_is_committed_is_known_after_a_restart(local: LocalCheckpoints) -> None:
    put(local, 5, 10)
    local.mark_committed(5)
    again = LocalCheckpoints(local.folder)
    assert again.committed_step == 5
    assert [c.committed for c in again.all()] == [False, True]


def test_pruning_keeps_the_newest_committed_what_is_on_its_way_and_what_is_newer(local: LocalCheckpoints) -> None:
    put(local, 1, 2, 3, 4, 5, 6)
    local.mark_committed(1)
    local.mark_committed(3)
    local.prune({5})
    assert steps(local) == [6, 5, 3]
    assert not (local.folder / "s0000000001.done").exists()


def test_nothing_is_pruned_while_nothing_is_committed_and_nothing_is_on_its_way(local: LocalCheckpoints) -> None:
    put(local, 1, 2)
    local.prune(set())
    assert steps(local) == [2, 1]


@pytest.mark.parametrize("damage", ["damaged", "other task", "other step"])
def test_a_checkpoint_that_is_not_what_its_name_says_is_removed(local: LocalCheckpoints, damage: str) -> None:
    put(local, 5, 10)
    said = {"damaged": "{", "other task": '["task_2", 10]', "other step": '["task_1", 9]'}[damage]
    (local.path(10) / "state.json").write_text(said)
    newest = local.newest("task_1")
    assert newest is not None
    assert newest.step == 5
    assert steps(local) == [5]


def test_other_tasks_go_when_the_coordinator_has_their_work_or_after_a_day(tmp_path: Path) -> None:
    for name in ("mine", "committed", "empty", "unsent", "stale"):
        folder = LocalCheckpoints(tmp_path / name)
        folder.folder.mkdir()
        if name != "empty":
            put(folder, 5)
    LocalCheckpoints(tmp_path / "committed").mark_committed(5)
    now = (tmp_path / "unsent" / "s0000000005").stat().st_mtime
    os.utime(tmp_path / "stale" / "s0000000005", (now - 90_000, now - 90_000))
    drop_other_tasks(tmp_path, keep="mine", now=now)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "unsent"]
    drop_other_tasks(tmp_path, keep="mine", now=now, all_of_them=True)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_any_of_several_events_ends_a_wait() -> None:
    first, second = threading.Event(), threading.Event()
    either = AnyOf(first, second)
    assert not either.is_set()
    assert not either.wait(0.01)
    threading.Timer(0.02, second.set).start()
    assert either.wait(10)
    assert either.is_set()
    assert not first.is_set()


def test_a_disk_that_can_never_hold_a_task_is_told_from_one_that_is_full_now() -> None:
    assert disk_refusal(total_bytes=1000, input_bytes=200, checkpoint_bytes=400) is None
    refusal = disk_refusal(total_bytes=999, input_bytes=200, checkpoint_bytes=400)
    assert refusal is not None
    assert "1000 B" in refusal
    assert "999 B" in refusal


def test_a_model_that_names_code_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    check_model(tmp_path)
    (tmp_path / "config.json").write_text('{"auto_map": {"AutoModel": "modeling.Evil"}}')
    with pytest.raises(InvalidArgument, match="never runs code"):
        check_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"config\.json"):
        check_model(tmp_path)
