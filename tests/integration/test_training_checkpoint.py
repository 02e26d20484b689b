"""What a checkpoint looks like on disk, and that it appears whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cbtm_common import faults
from cbtm_common.errors import IntegrityError, InvalidState, ResourceExhausted
from cbtm_common.recipe import LeaseRecipe
from cbtm_worker.train import Snapshot, Trainer, read_state, write_checkpoint
from cbtm_worker.train import checkpoint as checkpoint_module
from tests.support.models import Architecture
from tests.support.training import make_job, make_recipe

pytestmark = pytest.mark.integration


def files(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    with Trainer(make_job(tmp_path_factory.mktemp("job"))) as trainer:
        trainer.train_step()
        return trainer.snapshot()


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_model_of_a_checkpoint_is_a_plain_hugging_face_model(tmp_path: Path, architecture: Architecture) -> None:
    job = make_job(tmp_path, architecture=architecture)
    with Trainer(job) as trainer:
        trainer.train_step()
        taken = trainer.snapshot()
        write_checkpoint(taken, tmp_path / "c", final=False)
    load: Any = AutoModelForCausalLM.from_pretrained
    model, info = load(tmp_path / "c" / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, taken.weights[name]), name
    # Its config says nothing of the recipe's dropout, nor of this machine's paths.
    ours, seeds = ((d / "config.json").read_text() for d in (tmp_path / "c" / "model", job.model_dir))
    assert json.loads(ours) == json.loads(seeds)


def test_a_checkpoint_holds_the_state_and_a_final_one_only_the_model(tmp_path: Path, snapshot: Snapshot) -> None:
    write_checkpoint(snapshot, tmp_path / "c", final=False)
    write_checkpoint(snapshot, tmp_path / "f", final=True)
    model = ["model/config.json", "model/generation_config.json", "model/model.safetensors"]
    assert files(tmp_path / "c") == [*model, "optimizer.safetensors", "state.json"]
    assert files(tmp_path / "f") == [*model, "state.json"]
    state = json.loads((tmp_path / "c" / "state.json").read_text())
    assert state["format"] == "cbtm-checkpoint-1"
    assert (state["step"], state["total_steps"], state["data_key"]) == (1, 8, "run-c0001")
    assert state["recipe_sha256"] == make_recipe().training_sha256()
    assert state["loss"] > 0
    names = load_file(tmp_path / "c" / "optimizer.safetensors").keys()
    assert "transformer.wte.weight.exp_avg" in names
    assert "lm_head.weight.exp_avg" not in names  # tied: one tensor, one state


def test_a_final_checkpoint_can_be_opened_but_not_trained_on(tmp_path: Path) -> None:
    job = make_job(tmp_path, total_steps=1)
    with Trainer(job) as trainer:
        trainer.train_step()
        final = trainer.snapshot(final=True)
    assert final.optimizer is None
    with pytest.raises(InvalidState, match="final"):
        write_checkpoint(final, tmp_path / "c", final=False)
    write_checkpoint(final, tmp_path / "c", final=True)
    with Trainer(dataclasses.replace(job, resume_dir=tmp_path / "c")) as trainer:
        assert trainer.step == trainer.total_steps


def test_large_models_are_written_in_pieces(
    tmp_path: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "_PIECE", "40KB")
    write_checkpoint(snapshot, tmp_path / "c", final=True)
    assert len(list((tmp_path / "c" / "model").glob("model-*-of-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "c" / "model")
    assert all(torch.equal(w, snapshot.weights[name]) for name, w in model.state_dict().items())


def test_a_second_write_replaces_the_first(tmp_path: Path, snapshot: Snapshot) -> None:
    write_checkpoint(snapshot, tmp_path / "c", final=False)
    write_checkpoint(snapshot, tmp_path / "c", final=True)
    assert "optimizer.safetensors" not in files(tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_write_that_fails_leaves_nothing_and_the_older_one_whole(
    tmp_path: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(snapshot, tmp_path / "c", final=False)
    before = files(tmp_path)
    monkeypatch.setattr(faults, "_plan", faults.FaultPlan.parse("worker.checkpoint.after_write=raise"))
    with pytest.raises(faults.InjectedFault):
        write_checkpoint(snapshot, tmp_path / "c", final=True)
    assert files(tmp_path) == before


def test_a_disk_too_small_is_told_before_anything_is_written(
    tmp_path: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(ResourceExhausted, match="make room"):
        write_checkpoint(snapshot, tmp_path / "c", final=False)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_writing_is_told_and_cleaned_up(
    tmp_path: Path, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", full)
    with pytest.raises(ResourceExhausted, match="full"):
        write_checkpoint(snapshot, tmp_path / "c", final=False)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_touch_training_does_not_touch_the_recipes_digest() -> None:
    recipe = make_recipe()
    digest = recipe.training_sha256()
    assert recipe.model_copy(update={"lease": LeaseRecipe(lease_seconds=999)}).training_sha256() == digest
    assert recipe.model_copy(update={"seed": 6}).training_sha256() != digest


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format": "cbtm-checkpoint-2"}', '{"format": "cbtm-checkpoint-1", "step": 1}']
)
def test_a_state_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"state\.json"):
        read_state(tmp_path)


def test_a_state_of_a_later_version_that_says_more_is_read(tmp_path: Path, snapshot: Snapshot) -> None:
    write_checkpoint(snapshot, tmp_path / "c", final=True)
    path = tmp_path / "c" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "news": 1}))
    assert read_state(tmp_path / "c") == snapshot.state
