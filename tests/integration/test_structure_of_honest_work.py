"""What a real trainer writes passes the structural check, for models of many kinds, at a rate that is far too high."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cbtm_common.errors import CheckpointRejected
from cbtm_common.recipe import OptimizerRecipe, ScheduleRecipe
from cbtm_coordinator.clustering import seed_model
from cbtm_coordinator.structure.inspection import Expectation
from cbtm_worker.train import Trainer, write_checkpoint
from cbtm_worker.train import checkpoint as checkpoint_module
from cbtm_worker.train.job import TrainJob
from tests.support.checkpoints import inspect, learn_architecture
from tests.support.training import VOCABULARY, make_job, make_recipe

pytestmark = pytest.mark.integration

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_MODELS: dict[str, dict[str, Any]] = {
    "llama, tied": {**_SMALL, "model_type": "llama", "tie_word_embeddings": True},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
    },
    "gpt_neox": {**_SMALL, "model_type": "gpt_neox"},
    "opt": {**_SMALL, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
    "qwen2": {**_SMALL, "model_type": "qwen2"},
    # Its experts are many tensors in the files, and few in the modules.
    "mixtral": {**_SMALL, "model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1},
}
# Adam at 0.1 moves every weight as far as it ever can.
_RECIPE = make_recipe(
    optimizer=OptimizerRecipe(learning_rate=0.1, weight_decay=0.1),
    schedule=ScheduleRecipe(warmup_steps=0),
    dropout=None,
)


def _expected(base: seed_model.BaseModel, job: TrainJob, step: int, steps: Sequence[Any] = ()) -> Expectation:
    architecture = learn_architecture(base.directory, base.trained)
    before_step, before = steps[-1] if steps else (0, architecture.sizes)
    return Expectation(
        architecture=architecture,
        optimizer=job.recipe.optimizer,
        learning_rate=job.recipe.peak_learning_rate(seed=False),
        step=step,
        total_steps=job.total_steps,
        state={
            "format": checkpoint_module.FORMAT,
            "task_id": job.task_id,
            "kind": job.kind,
            "step": step,
            "total_steps": job.total_steps,
            "recipe_sha256": job.recipe.training_sha256(),
            "data_key": job.data_key,
        },
        start=architecture.sizes,
        before=before,
        before_step=before_step,
    )


@pytest.mark.parametrize("kind", _MODELS)
def test_every_checkpoint_of_a_task_passes(kind: str, tmp_path: Path) -> None:
    config = tmp_path / "model.json"
    config.write_text(json.dumps(_MODELS[kind]))
    (tmp_path / "base").mkdir()
    base = seed_model.from_scratch(config, tmp_path / "base", seed=1, vocab_size=VOCABULARY, eos_token_id=0)
    job = replace(make_job(tmp_path, recipe=_RECIPE), model_dir=base.directory)
    passed: list[Any] = []
    with Trainer(job) as trainer:
        for step in range(1, job.total_steps + 1):
            trainer.train_step()
            if step in (1, 2, 5, job.total_steps):
                final = step == job.total_steps
                write_checkpoint(trainer.snapshot(final=final), tmp_path / f"s{step}", final=final)
                passed.append((step, inspect(_expected(base, job, step, passed), tmp_path / f"s{step}")))
    # The same files at another step are not taken.
    with pytest.raises(CheckpointRejected):
        inspect(_expected(base, job, 3, passed[:1]), tmp_path / "s2")


def test_large_weights_come_in_pieces_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "_PIECE", "20KB")
    config = tmp_path / "model.json"
    config.write_text(json.dumps({**_MODELS["llama, tied"], "dtype": "bfloat16"}))
    (tmp_path / "base").mkdir()
    base = seed_model.from_scratch(config, tmp_path / "base", seed=1, vocab_size=VOCABULARY, eos_token_id=0)
    job = replace(make_job(tmp_path, recipe=_RECIPE), model_dir=base.directory)
    with Trainer(job) as trainer:
        trainer.train_step()
        write_checkpoint(trainer.snapshot(), tmp_path / "s1", final=False)
    assert len(list((tmp_path / "s1" / "model").glob("*.safetensors"))) > 2
    inspect(_expected(base, job, 1), tmp_path / "s1")
    index = tmp_path / "s1" / "model" / "model.safetensors.index.json"
    written = json.loads(index.read_text())
    first, last = (f(written["weight_map"].values()) for f in (min, max))
    written["weight_map"] = {name: {first: last, last: first}.get(f, f) for name, f in written["weight_map"].items()}
    index.write_text(json.dumps(written))
    with pytest.raises(CheckpointRejected, match="index"):
        inspect(_expected(base, job, 1), tmp_path / "s1")
