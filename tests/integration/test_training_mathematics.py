"""A step is the recipe's step, whatever the cut, and says what went wrong."""

from __future__ import annotations

import dataclasses
import gc
import os
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from cbtm_common.errors import IntegrityError, InvalidArgument, InvalidState
from cbtm_common.recipe import OptimizerRecipe
from cbtm_common.shards import read_shard
from cbtm_worker.train import Diverged, OutOfDeviceMemory, Trainer, TrainJob
from cbtm_worker.train.order import batch_indices
from tests.support.models import Architecture, make_tiny_model
from tests.support.training import make_job, make_recipe, make_shard

pytestmark = pytest.mark.integration

ARCHITECTURES: list[Architecture] = ["gpt2", "llama"]


def losses(job: TrainJob) -> list[float]:
    with Trainer(job) as trainer:
        return [trainer.train_step().loss for _ in range(job.total_steps)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_are_those_of_a_plain_pytorch_loop(tmp_path: Path, architecture: Architecture) -> None:
    """Written out from the recipe with transformers' own loss, one batch at a time, in the documented order."""
    recipe = make_recipe(dropout=0.0, optimizer=OptimizerRecipe(learning_rate=1e-2, weight_decay=0.1))
    job = make_job(tmp_path, architecture=architecture, recipe=recipe, micro_batch=4)
    L, B = recipe.sequence_length, recipe.global_batch
    sequences = [
        np.asarray(shard.tokens[i * L : i * L + L + 1], dtype=np.int64)
        for shard in map(read_shard, job.shard_paths)
        for i in range((len(shard.tokens) - 1) // L)
    ]
    model = AutoModelForCausalLM.from_pretrained(job.model_dir)
    model.train()
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        eps=1e-6,
    )
    expected = []
    for step in range(recipe.steps):
        rate = 1e-2 * ((step + 1) / 2 if step < 2 else 1 - (step - 2) / (recipe.steps - 2))
        order = batch_indices(step, global_batch=B, sequences=len(sequences), seed=recipe.seed, data_key=job.data_key)
        batch_BS = torch.from_numpy(np.stack([sequences[i] for i in order]))
        logits = model(input_ids=batch_BS[:, :-1]).logits
        loss = cross_entropy(logits.reshape(B * L, -1), batch_BS[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        expected.append(loss.item())
    with Trainer(job) as trainer:
        results = [trainer.train_step() for _ in range(recipe.steps)]
        weights = trainer.snapshot().weights
    assert [r.loss for r in results] == pytest.approx(expected, abs=1e-5)
    assert results[1].learning_rate == 1e-2
    assert results[0].tokens == B * L
    assert results[-1].loss < results[0].loss
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_micro_batch_gives_the_same_loss_curve(tmp_path: Path, architecture: Architecture) -> None:
    recipe = make_recipe(dropout=0.0, global_batch=6)
    job = make_job(tmp_path, architecture=architecture, recipe=recipe)
    curves = {micro: losses(dataclasses.replace(job, micro_batch=micro)) for micro in (1, 2, 3, 6)}
    for curve in curves.values():
        assert curve == pytest.approx(curves[6], abs=1e-4)


def test_recomputed_activations_change_nothing(tmp_path: Path) -> None:
    job = make_job(tmp_path, micro_batch=2)
    assert losses(dataclasses.replace(job, gradient_checkpointing=True)) == pytest.approx(losses(job), abs=1e-6)


def test_dropout_is_the_recipes_while_training_and_the_models_own_config_is_kept(tmp_path: Path) -> None:
    job = make_job(tmp_path, recipe=make_recipe(dropout=0.5))
    plain = dataclasses.replace(job, recipe=make_recipe(dropout=None))
    assert abs(losses(job)[0] - losses(plain)[0]) > 1e-4
    with Trainer(job) as trainer:
        assert trainer.snapshot().skeleton.config.resid_pdrop == 0.0


class FailingDevice:
    """Runs out of memory at every micro-step of more than `fits` sequences."""

    def __init__(self, fits: int) -> None:
        self.fits = fits
        self.seen: list[tuple[int, int, int]] = []

    def __call__(self, step: int, index: int, micro_batch: int) -> None:
        self.seen.append((step, index, micro_batch))
        if micro_batch > self.fits:
            raise torch.OutOfMemoryError("injected")


def test_out_of_memory_halves_the_micro_batch_and_redoes_the_step(tmp_path: Path) -> None:
    job = make_job(tmp_path, recipe=make_recipe(global_batch=8), micro_batch=8)
    device = FailingDevice(fits=2)
    with Trainer(job, before_micro_step=device) as trainer:
        curve = [trainer.train_step().loss for _ in range(3)]
        assert trainer.placement.micro_batch == 2
        assert not trainer.placement.gradient_checkpointing
    assert device.seen[:3] == [(0, 0, 8), (0, 0, 4), (0, 0, 2)]
    # Not a trace of the failed tries, dropout included.
    assert curve == losses(dataclasses.replace(job, micro_batch=2))[:3]


def test_what_fitted_after_an_out_of_memory_is_known_to_the_next_task_of_this_model(tmp_path: Path) -> None:
    cache = tmp_path / "cache.json"
    job = make_job(tmp_path, recipe=make_recipe(global_batch=8), placement_cache=cache)
    device = FailingDevice(fits=2)
    with Trainer(job, before_micro_step=device) as trainer:
        trainer.train_step()
    device.seen.clear()
    other = dataclasses.replace(job, recipe=make_recipe(global_batch=6), task_id="task_other", data_key="run-c0002")
    with Trainer(other, before_micro_step=device) as trainer:
        trainer.train_step()
        assert trainer.placement.micro_batch == 2
    assert device.seen == [(0, 0, 2), (0, 1, 2), (0, 2, 2)]
    longer = dataclasses.replace(other, recipe=make_recipe(global_batch=6, sequence_length=32))
    with Trainer(longer) as trainer:
        assert trainer.placement.micro_batch == 6


def test_out_of_memory_in_the_middle_of_a_step_leaves_no_half_gradient(tmp_path: Path) -> None:
    job = make_job(tmp_path, recipe=make_recipe(global_batch=8), micro_batch=2)
    calls = []

    def fail_once(step: int, index: int, micro_batch: int) -> None:
        calls.append((step, index, micro_batch))
        if len(calls) == 7:  # step 1, its third micro-step
            raise torch.OutOfMemoryError("injected")

    with Trainer(job, before_micro_step=fail_once) as trainer:
        first, second = trainer.train_step().loss, trainer.train_step().loss
        assert trainer.placement.micro_batch == 1
    assert calls[6] == (1, 2, 2)
    assert calls[7] == (1, 0, 1)
    reference = losses(dataclasses.replace(job, micro_batch=2))
    assert first == reference[0]
    assert second == pytest.approx(reference[1], abs=0.05)  # other dropout, same weights


def test_a_device_too_small_for_one_sequence_says_so_and_keeps_the_weights(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    device = FailingDevice(fits=4)
    with Trainer(job, before_micro_step=device) as trainer:
        trainer.train_step()
        before = trainer.snapshot()
        device.fits = 0
        with pytest.raises(OutOfDeviceMemory, match="micro-batch of 1"):
            trainer.train_step()
        assert trainer.placement.gradient_checkpointing is False or trainer.placement.micro_batch == 1
        after = trainer.snapshot()
    assert after.state.step == 1
    assert all(torch.equal(before.weights[name], weight) for name, weight in after.weights.items())


def test_recomputing_activations_is_the_last_resort(tmp_path: Path) -> None:
    job = make_job(tmp_path, recipe=make_recipe(dropout=0.0), micro_batch=4)
    tries: list[int] = []

    def too_small_until_recomputed(step: int, index: int, micro_batch: int) -> None:
        tries.append(micro_batch)
        if len(tries) <= 3:
            raise torch.OutOfMemoryError("injected")

    with Trainer(job, before_micro_step=too_small_until_recomputed) as trainer:
        loss = trainer.train_step().loss
        assert trainer.placement.gradient_checkpointing
    assert tries[:4] == [4, 2, 1, 4]
    assert loss == pytest.approx(losses(job)[0], abs=1e-6)


def test_an_operation_without_a_deterministic_form_is_used_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = make_job(tmp_path)
    calls = []

    def refuse_once(step: int, index: int, micro_batch: int) -> None:
        calls.append(micro_batch)
        if len(calls) == 1:
            raise RuntimeError("some_op_cuda does not have a deterministic implementation, but you set …")

    with Trainer(job, before_micro_step=refuse_once) as trainer:
        assert trainer.train_step().loss == losses(job)[0]
    assert "will not repeat to the bit" in caplog.text


def test_a_defect_in_a_step_is_not_mistaken_for_too_little_memory(tmp_path: Path) -> None:
    def fail(step: int, index: int, micro_batch: int) -> None:
        raise RuntimeError("a shape is wrong")

    with Trainer(make_job(tmp_path), before_micro_step=fail) as trainer, pytest.raises(RuntimeError, match="shape"):
        trainer.train_step()


def test_a_shard_that_shrinks_while_it_is_in_use_is_told(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    with Trainer(job) as trainer:
        for path in job.shard_paths:
            os.truncate(path, 300)
        with pytest.raises(IntegrityError, match="shorter"):
            trainer.train_step()


def test_a_loss_that_is_no_number_stops_training_and_is_never_checkpointed(tmp_path: Path) -> None:
    recipe = make_recipe(optimizer=OptimizerRecipe(learning_rate=1e30, gradient_clip=0))
    with pytest.raises(Diverged, match="at step"):
        losses(make_job(tmp_path, recipe=recipe))


def test_stepping_past_the_end_is_an_error(tmp_path: Path) -> None:
    job = make_job(tmp_path, total_steps=1)
    with Trainer(job) as trainer:
        trainer.train_step()
        with pytest.raises(InvalidState, match="all 1 steps"):
            trainer.train_step()


def test_jobs_that_cannot_be_name_the_field(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    cases: list[tuple[str, TrainJob]] = [
        ("sequence_length", dataclasses.replace(job, recipe=make_recipe(sequence_length=129))),
        ("shard_paths", dataclasses.replace(job, shard_paths=[make_shard(tmp_path / "short", tokens=16)])),
        ("shard_paths", dataclasses.replace(job, shard_paths=[make_shard(tmp_path / "v", tokens=99, vocab_size=257)])),
        ("model_dir", dataclasses.replace(job, model_dir=tmp_path / "nowhere")),
        ("device", dataclasses.replace(job, device="abacus")),
    ]
    for field, bad in cases:
        with pytest.raises(InvalidArgument, match=field) as caught:
            Trainer(bad)
        assert caught.value.field == field


def test_a_model_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    directory = tmp_path / "remote"
    directory.mkdir()
    (directory / "evil.py").write_text("raise SystemExit('executed')")
    (directory / "config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}'
    )
    with pytest.raises(InvalidArgument, match="model_dir"):
        Trainer(dataclasses.replace(job, model_dir=directory))


def test_a_model_with_a_weight_missing_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = make_tiny_model(tmp_path / "holed", architecture="llama")
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"layers\.1\.mlp"):
        Trainer(make_job(tmp_path, model_dir=directory))


def test_memory_does_not_grow_with_steps(tmp_path: Path) -> None:
    recipe = make_recipe(steps=400, global_batch=2)
    process = psutil.Process()
    with Trainer(make_job(tmp_path, recipe=recipe)) as trainer:
        for _ in range(100):
            trainer.train_step()
        trainer.snapshot()
        gc.collect()
        before, objects = process.memory_info().rss, len(gc.get_objects())
        for _ in range(200):
            trainer.train_step()
        trainer.snapshot()
        gc.collect()
        assert len(gc.get_objects()) - objects < 100
        assert process.memory_info().rss - before < 8 << 20
