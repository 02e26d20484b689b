"""Two processes on the CPU train one task as one process does; either can go on with what the other left."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from cbtm_common.errors import InternalError
from cbtm_worker.train import Snapshot, Trainer, TrainJob, together, write_checkpoint
from tests.support.training import make_job, make_recipe

pytestmark = pytest.mark.integration


def alone(job: TrainJob) -> tuple[list[float], Snapshot]:
    with Trainer(job) as trainer:
        return [trainer.train_step().loss for _ in range(trainer.step, trainer.total_steps)], trainer.snapshot()


def in_two(job: TrainJob, *, until: int) -> tuple[list[float], Snapshot]:
    with together(job, ["cpu"]) as group, Trainer(job, group=group) as trainer:
        return [trainer.train_step().loss for _ in range(trainer.step, until)], trainer.snapshot()


def test_two_processes_make_one_processs_steps_and_one_goes_on_with_what_two_left(tmp_path: Path) -> None:
    # Dropout too: micro-steps draw by their number, wherever they are made.
    job = make_job(tmp_path, recipe=make_recipe(global_batch=8, dropout=0.1), micro_batch=2)
    curve, end = alone(job)
    both, left = in_two(job, until=5)
    assert both == pytest.approx(curve[:5], abs=1e-4)
    assert (left.state.devices, left.state.micro_batch, end.state.devices) == (2, 2, 1)
    write_checkpoint(left, tmp_path / "checkpoint", final=False)
    rest, resumed = alone(dataclasses.replace(job, resume_dir=tmp_path / "checkpoint"))
    assert rest == pytest.approx(curve[5:], abs=1e-4)
    for name, weight in end.weights.items():
        torch.testing.assert_close(resumed.weights[name], weight, atol=1e-3, rtol=0)
    assert multiprocessing.active_children() == []


def test_two_processes_resume_to_the_bits_of_an_undisturbed_run_and_run_out_of_memory_together(tmp_path: Path) -> None:
    job = make_job(tmp_path, recipe=make_recipe(global_batch=8))
    tries = []

    def first_is_too_small(step: int, index: int, micro_batch: int) -> None:
        tries.append(micro_batch)
        if micro_batch > 2:
            raise torch.OutOfMemoryError("injected")

    with (
        together(job, ["cpu"]) as group,
        Trainer(job, group=group, before_micro_step=first_is_too_small) as trainer,
    ):
        while trainer.step < 4:
            trainer.train_step()
        write_checkpoint(trainer.snapshot(), tmp_path / "checkpoint", final=False)
        while trainer.step < trainer.total_steps:
            trainer.train_step()
        undisturbed = trainer.snapshot()
    assert tries[:3] == [4, 2, 2]
    _, resumed = in_two(dataclasses.replace(job, resume_dir=tmp_path / "checkpoint"), until=job.total_steps)
    assert resumed.state == undisturbed.state
    assert [n for n, w in undisturbed.weights.items() if not torch.equal(w, resumed.weights[n])] == []


def lose_the_peer(job: TrainJob) -> None:
    with together(job, ["cpu"]) as group, Trainer(job, group=group) as trainer:
        trainer.train_step()
        (peer,) = multiprocessing.active_children()
        assert peer.pid is not None
        os.kill(peer.pid, signal.SIGKILL)
        peer.join()
        while True:
            trainer.train_step()


def test_a_process_that_is_killed_ends_the_task_with_an_error_and_leaves_nobody_behind(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="has ended"):
        lose_the_peer(make_job(tmp_path))
    assert multiprocessing.active_children() == []


def begin_on(job: TrainJob, peer: str) -> None:
    with together(job, [peer]) as group, Trainer(job, group=group):
        raise AssertionError("it began")


def test_a_process_that_cannot_begin_is_told_by_its_device(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="cuda:7"):
        begin_on(make_job(tmp_path), "cuda:7")
    assert multiprocessing.active_children() == []
