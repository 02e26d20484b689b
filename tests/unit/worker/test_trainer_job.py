"""What the worker's loop and training share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cbtm_worker.train as train
from cbtm_common.recipe import Recipe
from cbtm_worker.train.job import StepResult, TrainJob


def test_importing_the_package_and_making_a_job_imports_no_torch() -> None:
    code = "import sys, cbtm_worker.train as t; t.TrainJob, t.Diverged; print([m for m in sys.modules if m in HEAVY])"
    out = subprocess.run(
        [sys.executable, "-c", "HEAVY = ('torch', 'transformers', 'safetensors')\n" + code],
        check=True,
        capture_output=True,
        text=True,
    )
    assert out.stdout.strip() == "[]"


def test_every_public_name_has_a_home() -> None:
    assert sorted(train._HOME) == train.__all__


def test_a_loss_is_fetched_only_when_it_is_read() -> None:
    reads = []

    def values() -> tuple[float, float]:
        reads.append(1)
        return 2.5, 0.5

    result = StepResult(step=3, tokens=64, seconds=0.1, learning_rate=1e-3, values=values)
    assert "step=3" in repr(result)
    assert not reads
    assert (result.loss, result.grad_norm) == (2.5, 0.5)


def test_a_job_names_its_task_and_leaves_placement_to_the_worker() -> None:
    job = TrainJob(
        recipe=Recipe(),
        task_id="task_a",
        kind="expert",
        total_steps=10,
        model_dir=Path("m"),
        shard_paths=[],
        data_key="run-c0000",
    )
    assert (job.device, job.micro_batch, job.resume_dir) == ("cpu", None, None)
