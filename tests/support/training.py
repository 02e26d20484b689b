"""Small training jobs for tests: a tiny model, random shards, a recipe of a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cbtm_common.recipe import OptimizerRecipe, Precision, Recipe, ScheduleRecipe
from cbtm_common.shards import write_shard
from cbtm_worker.train.job import TrainJob
from tests.support.models import EOS_TOKEN_ID, Architecture, make_tiny_model

VOCABULARY = 256


def make_shard(path: Path, *, tokens: int, seed: int = 0, vocab_size: int = VOCABULARY) -> Path:
    """A shard of documents that a model can learn from: each repeats a few tokens of its own."""
    random = np.random.default_rng(seed)
    documents: list[np.ndarray[Any, Any]] = []
    length = 0
    while length < tokens:
        words = random.integers(1, vocab_size, size=6)
        document = np.append(random.choice(words, size=int(random.integers(5, 40))), EOS_TOKEN_ID)
        documents.append(document[-(tokens - length) :])
        length += len(documents[-1])
    offsets = np.cumsum([0] + [len(d) for d in documents[:-1]])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_shard(path, np.concatenate(documents), offsets, vocab_size=vocab_size, eos_token_id=EOS_TOKEN_ID)
    return path


def make_recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "sequence_length": 16,
        "global_batch": 4,
        "steps": 8,
        "seed": 5,
        "precision": Precision.FP32,
        "dropout": 0.1,
        "optimizer": OptimizerRecipe(learning_rate=1e-2, weight_decay=0.1),
        "schedule": ScheduleRecipe(warmup_steps=2),
    }
    return Recipe(**{**values, **changes})


def make_job(
    directory: Path, *, architecture: Architecture = "gpt2", recipe: Recipe | None = None, **changes: Any
) -> TrainJob:
    """A job over two shards under `directory`; equal arguments give equal jobs (files are made once)."""
    model = directory / f"model-{architecture}"
    if not model.exists():
        make_tiny_model(model, architecture=architecture, vocab_size=VOCABULARY, seed=1)
    shards = [directory / f"shard{i}.safetensors" for i in range(2)]
    for number, shard in enumerate(shards):
        if not shard.exists():
            make_shard(shard, tokens=300 + 100 * number, seed=number)
    recipe = recipe or make_recipe()
    values: dict[str, Any] = {
        "recipe": recipe,
        "task_id": "task_test",
        "kind": "expert",
        "total_steps": recipe.steps,
        "model_dir": model,
        "shard_paths": shards,
        "data_key": "run-c0001",
    }
    return TrainJob(**{**values, **changes})
