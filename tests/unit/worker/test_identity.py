"""Slots and identities: one process, one identity; secrets readable by their owner alone."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cbtm_common.errors import ResourceExhausted
from cbtm_worker import identity as module
from cbtm_worker.identity import Identity, take_slot

ME = Identity(worker_id="worker_1", private_key="secret")


def test_an_identity_is_found_again_by_the_next_process_for_the_same_coordinator(tmp_path: Path) -> None:
    slot = take_slot(tmp_path, "a:1")
    assert slot.load() is None
    slot.save(ME)
    slot.release()
    again = take_slot(tmp_path, "a:1")
    assert again.load() == ME
    assert again.directory == slot.directory
    again.release()


def test_another_coordinator_is_another_identity(tmp_path: Path) -> None:
    first, second = take_slot(tmp_path, "a:1"), take_slot(tmp_path, "a:2")
    first.save(ME)
    assert second.load() is None
    first.release()
    second.release()


def test_a_second_process_takes_the_next_slot_and_a_third_the_one_given_back(tmp_path: Path) -> None:
    first, second = take_slot(tmp_path, "a:1"), take_slot(tmp_path, "a:1")
    assert first.directory != second.directory
    first.release()
    third = take_slot(tmp_path, "a:1")
    assert third.directory == first.directory
    third.release()
    second.release()


def test_a_slot_is_free_again_when_its_process_is_killed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from cbtm_worker.identity import take_slot;"
        "slot = take_slot(Path(sys.argv[1]), 'a:1'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    slot = take_slot(tmp_path, "a:1")
    assert slot.directory.name.endswith("-0")
    slot.release()


def test_the_credential_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    slot = take_slot(tmp_path, "a:1")
    slot.save(ME)
    slot.save(Identity(worker_id="worker_2", private_key="other"))
    path = slot.directory / "identity.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in slot.directory.glob("identity*")] == ["identity.json"]
    slot.release()


def test_a_forgotten_identity_is_gone_and_may_be_forgotten_again(tmp_path: Path) -> None:
    slot = take_slot(tmp_path, "a:1")
    slot.save(ME)
    slot.forget()
    slot.forget()
    assert slot.load() is None
    slot.release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"worker_id": "w"}', '{"other": 1}', "\0\0\0"])
def test_a_damaged_identity_is_as_good_as_none(tmp_path: Path, content: str) -> None:
    slot = take_slot(tmp_path, "a:1")
    (slot.directory / "identity.json").write_text(content)
    assert slot.load() is None
    slot.release()


def test_too_many_processes_are_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_SLOTS", 1)
    slot = take_slot(tmp_path, "a:1")
    with pytest.raises(ResourceExhausted, match="another --cache-dir"):
        take_slot(tmp_path, "a:1")
    slot.release()
