"""Micro-batches that fit are kept by what they depend on, and a file that is broken costs nothing but a probe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cbtm_worker.train.memory import Placement
from cbtm_worker.train.placement_cache import PlacementCache, placement_key

CONFIG = {"hidden_size": 64, "eos_token_id": 1, "_name_or_path": "a"}
CARD: dict[str, Any] = {"sequence_length": 128, "precision": "bf16", "device": "a GPU", "device_bytes": 80}


def test_devices_that_share_a_model_have_more_room_than_one() -> None:
    keys = {
        placement_key(CONFIG, **CARD),
        placement_key(CONFIG, **CARD, shares=2),
        placement_key(CONFIG, **CARD, shares=4),
    }
    assert len(keys) == 3


def test_what_is_put_is_got_by_another_and_the_newest_counts(tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    PlacementCache(path).put("a", Placement(micro_batch=8))
    PlacementCache(path).put("b", Placement(micro_batch=2, gradient_checkpointing=True))
    PlacementCache(path).put("a", Placement(micro_batch=4))
    cache = PlacementCache(path)
    assert cache.get("a") == Placement(micro_batch=4)
    assert cache.get("b") == Placement(micro_batch=2, gradient_checkpointing=True)
    assert cache.get("c") is None


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}', '{"a": {"micro": 3}}'])
def test_a_damaged_file_is_told_and_written_anew(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cache.json"
    path.write_text(text)
    assert PlacementCache(path).get("a") is None
    assert str(path) in caplog.text
    PlacementCache(path).put("a", Placement(micro_batch=4))
    assert PlacementCache(path).get("a") == Placement(micro_batch=4)


def test_a_folder_that_cannot_be_written_costs_no_task(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    PlacementCache(tmp_path / "file" / "cache.json").put("a", Placement(micro_batch=4))
    assert "not kept" in caplog.text


@pytest.mark.parametrize(
    "change", [{"sequence_length": 64}, {"precision": "fp32"}, {"device": "b"}, {"device_bytes": 40}]
)
def test_all_that_memory_depends_on_is_in_the_key(change: dict[str, Any]) -> None:
    assert placement_key(CONFIG, **CARD) != placement_key(CONFIG, **{**CARD, **change})


def test_the_models_shape_is_in_the_key_and_its_name_is_not() -> None:
    assert placement_key(CONFIG, **CARD) == placement_key({**CONFIG, "_name_or_path": "b", "eos_token_id": 2}, **CARD)
    assert placement_key(CONFIG, **CARD) != placement_key({**CONFIG, "hidden_size": 65}, **CARD)
