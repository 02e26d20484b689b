"""Killed anywhere and resumed, training ends with the same bits."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cbtm_common.errors import IntegrityError, InvalidState
from cbtm_worker.train import Snapshot, Trainer, TrainJob, write_checkpoint
from tests.support.models import Architecture
from tests.support.training import make_job, make_recipe

pytestmark = pytest.mark.integration

ARCHITECTURES: list[Architecture] = ["gpt2", "llama"]


def train(job: TrainJob, *, until: int | None = None) -> Snapshot:
    with Trainer(job) as trainer:
        while trainer.step < (job.total_steps if until is None else until):
            trainer.train_step()
        return trainer.snapshot()


def assert_same_bits(a: Snapshot, b: Snapshot) -> None:
    assert a.state == b.state
    assert a.optimizer is not None
    assert b.optimizer is not None
    for left, right in ((a.weights, b.weights), (a.optimizer, b.optimizer)):
        assert left.keys() == right.keys()
        assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("at", [0, 1, 5, 8])
def test_resumed_at_any_step_weights_and_optimizer_are_those_of_an_undisturbed_run(
    tmp_path: Path, architecture: Architecture, at: int
) -> None:
    job = make_job(tmp_path, architecture=architecture)
    undisturbed = train(job)
    write_checkpoint(train(job, until=at), tmp_path / "checkpoint", final=False)
    torch.manual_seed(999)  # whatever the process drew in between
    assert_same_bits(train(dataclasses.replace(job, resume_dir=tmp_path / "checkpoint")), undisturbed)


def test_resumed_after_every_step_of_several_data_epochs_nothing_drifts(tmp_path: Path) -> None:
    # 8 steps of 24 sequences over 42 sequences: four data epochs and batches that span two.
    job = make_job(tmp_path, recipe=make_recipe(global_batch=24))
    undisturbed = train(job)
    for step in range(1, job.total_steps + 1):
        resume = tmp_path / str(step - 1) if step > 1 else None
        write_checkpoint(
            train(dataclasses.replace(job, resume_dir=resume), until=step), tmp_path / str(step), final=False
        )
    assert_same_bits(train(dataclasses.replace(job, resume_dir=tmp_path / str(job.total_steps))), undisturbed)


def test_killed_again_and_again_training_ends_in_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL after a step, in the middle of writing, and before writing; then a process that runs to the end."""
    job = make_job(tmp_path)
    plans = [
        "worker.step.after=kill@3",
        "worker.checkpoint.after_write=kill@3",
        "worker.checkpoint.before_write=kill@2",
        "",
    ]
    child = subprocess.run(
        [sys.executable, "-m", "tests.support.train_child", str(tmp_path), *plans],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        check=True,
        timeout=120,
    )
    killed = -signal.SIGKILL
    assert json.loads(child.stdout) == [[killed, 2], [killed, 4], [killed, 5], [0, job.total_steps]]
    assert_same_bits(train(dataclasses.replace(job, resume_dir=tmp_path / "kept" / "checkpoint")), train(job))


def test_a_snapshot_does_not_change_while_training_goes_on(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    with Trainer(job) as trainer:
        trainer.train_step()
        snapshot = trainer.snapshot()
        before = {name: weight.clone() for name, weight in snapshot.weights.items()}
        trainer.train_step()
    assert all(torch.equal(before[name], weight) for name, weight in snapshot.weights.items())
    assert_same_bits(snapshot, train(job, until=1))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"recipe": make_recipe(seed=6)}, "recipe_sha256"),
        ({"data_key": "run-c0002"}, "data_key"),
        ({"kind": "seed"}, "kind"),
        ({"total_steps": 9}, "total_steps"),
    ],
)
def test_a_checkpoint_of_another_job_is_refused(tmp_path: Path, change: dict[str, object], field: str) -> None:
    job = make_job(tmp_path)
    write_checkpoint(train(job, until=1), tmp_path / "checkpoint", final=False)
    other = dataclasses.replace(job, resume_dir=tmp_path / "checkpoint", **change)  # type: ignore[arg-type]
    with pytest.raises(InvalidState, match=field):
        Trainer(other)


def test_a_checkpoint_with_a_damaged_file_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    checkpoint = tmp_path / "checkpoint"
    resumed = dataclasses.replace(job, resume_dir=checkpoint)
    snapshot = train(job, until=1)
    for name in ("state.json", "optimizer.safetensors", "model/model.safetensors"):
        write_checkpoint(snapshot, checkpoint, final=False)
        with (checkpoint / name).open("r+b") as file:
            file.truncate(40)
        with pytest.raises(IntegrityError, match=name.partition("/")[0]):
            Trainer(resumed)
        (checkpoint / name).unlink()
        with pytest.raises(IntegrityError):
            Trainer(resumed)
