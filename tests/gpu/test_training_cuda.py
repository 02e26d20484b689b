"""Training on a CUDA device: bf16, the same bits after a resume, and a card that is too small."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cbtm_common.recipe import Precision
from cbtm_worker.train import Shard, Snapshot, StartAgain, Trainer, TrainJob, together, write_checkpoint
from tests.support.models import Architecture, make_tiny_model
from tests.support.training import VOCABULARY, make_job, make_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def job_on_cuda(directory: Path, *, architecture: Architecture = "gpt2", precision: Precision) -> TrainJob:
    return make_job(directory, architecture=architecture, recipe=make_recipe(precision=precision), device="cuda")


def train(job: TrainJob, *, until: int | None = None) -> Snapshot:
    with Trainer(job) as trainer:
        while trainer.step < (job.total_steps if until is None else until):
            trainer.train_step()
        return trainer.snapshot()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_resumed_weights_and_optimizer_are_those_of_an_undisturbed_run(
    tmp_path: Path, architecture: Architecture, precision: Precision, compiled: bool
) -> None:
    job = job_on_cuda(tmp_path, architecture=architecture, precision=precision)
    job = dataclasses.replace(job, compile=compiled)
    undisturbed = train(job)
    write_checkpoint(train(job, until=3), tmp_path / "c", final=False)
    resumed = train(dataclasses.replace(job, resume_dir=tmp_path / "c"))
    assert resumed.state == undisturbed.state
    assert resumed.optimizer is not None
    assert undisturbed.optimizer is not None
    for left, right in ((resumed.weights, undisturbed.weights), (resumed.optimizer, undisturbed.optimizer)):
        assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_losses_are_the_cpus_up_to_rounding(tmp_path: Path) -> None:
    recipe = make_recipe(dropout=0.0)
    cpu, cuda = make_job(tmp_path, recipe=recipe), make_job(tmp_path, recipe=recipe, device="cuda")
    curves = []
    for job in (cpu, cuda):
        with Trainer(job) as trainer:
            curves.append([trainer.train_step().loss for _ in range(job.total_steps)])
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)


def test_bf16_is_used_where_the_device_has_it_and_weights_stay_float32(tmp_path: Path) -> None:
    with Trainer(job_on_cuda(tmp_path, precision=Precision.BF16)) as trainer:
        expected = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        assert trainer.precision == expected
        trainer.train_step()
        assert {w.dtype for w in trainer.snapshot().weights.values() if w.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_queues_its_work_and_never_waits_for_the_device(tmp_path: Path, compiled: bool) -> None:
    with Trainer(dataclasses.replace(job_on_cuda(tmp_path, precision=Precision.BF16), compile=compiled)) as trainer:
        trainer.train_step()
        trainer.train_step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.train_step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def small_card() -> Iterator[None]:
    """About 1.5 GB, whatever the card has."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.5e9 / torch.cuda.get_device_properties(0).total_memory)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("small_card")
def test_a_card_that_runs_out_of_memory_halves_the_micro_batch_and_goes_on(tmp_path: Path) -> None:
    model = make_tiny_model(
        tmp_path / "model", architecture="llama", vocab_size=VOCABULARY, hidden_size=512, layers=8, context=128
    )
    recipe = make_recipe(sequence_length=128, global_batch=128, dropout=0.0, steps=3)
    job = make_job(tmp_path, recipe=recipe, model_dir=model, device="cuda", micro_batch=128)
    with Trainer(job) as trainer:
        curve = [trainer.train_step().loss for _ in range(recipe.steps)]
        assert trainer.placement.micro_batch < 128
    with Trainer(dataclasses.replace(job, micro_batch=8)) as trainer:
        assert curve == pytest.approx([trainer.train_step().loss for _ in range(recipe.steps)], abs=1e-3)


@pytest.mark.usefixtures("small_card")
def test_a_probe_finds_a_micro_batch_that_fits_and_the_next_task_knows_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_tiny_model(
        tmp_path / "model", architecture="llama", vocab_size=VOCABULARY, hidden_size=512, layers=8, context=128
    )
    recipe = make_recipe(sequence_length=128, global_batch=512, dropout=0.0, steps=2)
    job = make_job(tmp_path, recipe=recipe, model_dir=model, device="cuda", placement_cache=tmp_path / "cache.json")
    with Trainer(dataclasses.replace(job, compile=False)) as trainer:
        found = trainer.placement
        trainer.train_step()
        assert trainer.placement == found
    assert 1 < found.micro_batch < 512
    assert "does not fit" not in caplog.text
    with Trainer(job) as trainer:
        assert trainer.placement == found


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two CUDA devices")
def test_two_cards_make_the_steps_of_one(tmp_path: Path) -> None:
    job = make_job(tmp_path, recipe=make_recipe(global_batch=8, dropout=0.1), micro_batch=2, device="cuda:0")
    job = dataclasses.replace(job, compile=False)
    with Trainer(job) as trainer:
        alone = [trainer.train_step().loss for _ in range(job.total_steps)]
    with together(job, ["cuda:1"]) as group, Trainer(job, group=group) as trainer:
        both = [trainer.train_step().loss for _ in range(job.total_steps)]
    assert both == pytest.approx(alone, abs=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two CUDA devices")
@pytest.mark.parametrize("precision", list(Precision))
def test_two_cards_that_share_a_model_make_the_steps_of_one_and_leave_its_checkpoint(
    tmp_path: Path, precision: Precision
) -> None:
    recipe = make_recipe(global_batch=8, dropout=0.1, precision=precision)
    job = make_job(tmp_path, architecture="llama", recipe=recipe, micro_batch=2, device="cuda:0", compile=False)
    with Trainer(job) as trainer:
        alone = [trainer.train_step().loss for _ in range(job.total_steps)]
    tolerance = 1e-3 if precision is Precision.FP32 else 2e-2
    both = dataclasses.replace(job, shard=Shard.ALWAYS)
    with together(both, ["cuda:1"]) as group, Trainer(both, group=group) as trainer:
        curve = [trainer.train_step().loss for _ in range(4)]
        write_checkpoint(trainer.snapshot(), tmp_path / "c", final=False)
    with Trainer(dataclasses.replace(job, resume_dir=tmp_path / "c")) as trainer:
        curve += [trainer.train_step().loss for _ in range(4, job.total_steps)]
    assert curve == pytest.approx(alone, abs=tolerance)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two CUDA devices")
def test_a_card_that_runs_out_of_memory_within_a_shared_step_ends_the_group_at_once(tmp_path: Path) -> None:
    def out_of_memory(step: int, index: int, micro_batch: int) -> None:
        if (step, index) == (1, 1):
            raise torch.OutOfMemoryError("injected")

    job = make_job(tmp_path, recipe=make_recipe(global_batch=8), micro_batch=2, device="cuda:0", shard=Shard.ALWAYS)

    def train_until_it_fails() -> None:
        with (
            together(job, ["cuda:1"]) as group,
            Trainer(job, group=group, before_micro_step=out_of_memory) as trainer,
        ):
            while True:
                trainer.train_step()

    with pytest.raises(StartAgain) as caught:
        train_until_it_fails()
    assert caught.value.changes == {"micro_batch": 1, "gradient_checkpointing": False}
    assert multiprocessing.active_children() == []
