"""Two processes on the CPU share one model (FSDP2 over gloo) and train it as one does; checkpoints are the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from cbtm_common.errors import InternalError, InvalidArgument
from cbtm_worker.train import Shard, Snapshot, StartAgain, Trainer, TrainJob, peers, together, write_checkpoint
from cbtm_worker.train import layout as layout_module
from cbtm_worker.train.group import ProcessGroup
from cbtm_worker.train.layout import Layout, choose_layout
from cbtm_worker.train.loss import Loss
from cbtm_worker.train.model import load_model
from cbtm_worker.train.sharding import Sharded, blocks_of
from cbtm_worker.train.trainer import MicroStepHook
from tests.support.models import Architecture
from tests.support.training import VOCABULARY, make_job, make_recipe

pytestmark = pytest.mark.integration


def alone(job: TrainJob, *, until: int | None = None) -> tuple[list[tuple[float, float]], Snapshot]:
    with Trainer(job) as trainer:
        return curve(trainer, until or job.total_steps), trainer.snapshot()


def shared(job: TrainJob, *, until: int | None = None) -> tuple[list[tuple[float, float]], Snapshot]:
    with together(job, ["cpu"]) as group, Trainer(job, group=group) as trainer:
        assert trainer.computation.environment.endswith(", 2 devices, sharded") == (job.shard is Shard.ALWAYS)
        return curve(trainer, until or job.total_steps), trainer.snapshot()


def curve(trainer: Trainer, until: int) -> list[tuple[float, float]]:
    results = [trainer.train_step() for _ in range(trainer.step, until)]
    return [(result.loss, result.grad_norm) for result in results]


def near(expected: list[tuple[float, float]]) -> Any:
    return pytest.approx([pytest.approx(pair, rel=2e-5) for pair in expected])


def local(tensor: torch.Tensor) -> torch.Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


def assert_close(ours: Snapshot, theirs: Snapshot, *, atol: float) -> None:
    assert ours.optimizer is not None
    assert theirs.optimizer is not None
    for left, right in ((ours.weights, theirs.weights), (ours.optimizer, theirs.optimizer)):
        assert list(left) == list(right)
        for name in right:
            torch.testing.assert_close(left[name], right[name], atol=atol, rtol=0)


# GPT-2 ties its head to its embedding.
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_two_that_share_a_model_make_ones_steps_and_either_goes_on_with_what_the_other_left(
    tmp_path: Path, architecture: Architecture
) -> None:
    job = make_job(tmp_path, architecture=architecture, recipe=make_recipe(global_batch=8, dropout=0.1), micro_batch=2)
    both = replace(job, shard=Shard.ALWAYS)
    expected, end = alone(job)
    first, left = shared(both, until=4)
    assert first == near(expected[:4])
    assert (left.state.devices, left.state.micro_batch) == (2, 2)
    write_checkpoint(left, tmp_path / "shared", final=False)
    rest, after = alone(replace(job, resume_dir=tmp_path / "shared"))
    assert rest == near(expected[4:])
    assert_close(after, end, atol=2e-4)

    _, begun = alone(job, until=4)
    assert_close(left, begun, atol=2e-4)
    write_checkpoint(begun, tmp_path / "alone", final=False)
    assert {p.name for p in (tmp_path / "alone" / "model").iterdir()} == {
        p.name for p in (tmp_path / "shared" / "model").iterdir()
    }
    rest, after = shared(replace(both, resume_dir=tmp_path / "alone"))
    assert rest == near(expected[4:])
    assert_close(after, end, atol=2e-4)
    assert multiprocessing.active_children() == []


def test_a_shared_model_resumes_to_the_bits_of_an_undisturbed_run_with_recomputed_activations_too(
    tmp_path: Path,
) -> None:
    recipe = make_recipe(global_batch=8, dropout=0.0)
    job = make_job(tmp_path, recipe=recipe, micro_batch=2, shard=Shard.ALWAYS, gradient_checkpointing=True)
    with together(job, ["cpu"]) as group, Trainer(job, group=group) as trainer:
        held = sum(local(p).numel() for p in trainer._parameters.values())
        # The first process has the larger part of what cannot be halved.
        assert trainer.parameter_count / 2 <= held < trainer.parameter_count / 2 + len(trainer._parameters) * 32
        begun = curve(trainer, 3)
        write_checkpoint(trainer.snapshot(), tmp_path / "c", final=False)
        rest = curve(trainer, job.total_steps)
        undisturbed, final = trainer.snapshot(), trainer.snapshot(final=True)
    assert final.optimizer is None
    resumed_rest, resumed = shared(replace(job, resume_dir=tmp_path / "c"))
    assert resumed_rest == rest
    assert_close(resumed, undisturbed, atol=0)
    expected, _ = alone(replace(job, shard=Shard.AUTO, gradient_checkpointing=False))
    assert begun + rest == near(expected)


def test_three_share_what_cannot_be_dealt_evenly(tmp_path: Path) -> None:
    # Of the 32 rows of most tensors, 11, 11 and 10.
    job = make_job(tmp_path, recipe=make_recipe(global_batch=6), micro_batch=2)
    expected, end = alone(job)
    job = replace(job, shard=Shard.ALWAYS)
    with together(job, ["cpu", "cpu"]) as group, Trainer(job, group=group) as trainer:
        assert curve(trainer, job.total_steps) == near(expected)
        assert_close(trainer.snapshot(), end, atol=2e-4)


def test_on_cpus_a_model_is_shared_only_when_asked(tmp_path: Path) -> None:
    shared(make_job(tmp_path), until=1)
    shared(make_job(tmp_path, shard=Shard.NEVER), until=1)


def train_all(job: TrainJob, hook: MicroStepHook | None = None) -> None:
    with together(job, ["cpu"]) as group, Trainer(job, group=group, before_micro_step=hook) as trainer:
        curve(trainer, job.total_steps)


def out_of_memory(step: int, index: int, micro_batch: int) -> None:
    if step == 1 and index == 1:
        raise torch.OutOfMemoryError("injected")


def test_the_first_process_runs_out_of_memory_within_a_step_and_says_how_to_go_on(tmp_path: Path) -> None:
    job = make_job(tmp_path, recipe=make_recipe(global_batch=8), micro_batch=2, shard=Shard.ALWAYS)
    with pytest.raises(StartAgain, match="cpu ran out of memory") as caught:
        train_all(job, out_of_memory)
    assert caught.value.changes == {"micro_batch": 1, "gradient_checkpointing": False}
    assert multiprocessing.active_children() == []
    changes: dict[str, Any] = dict(caught.value.changes)
    shared(replace(job, **changes), until=1)


def peer_out_of_memory(*arguments: Any) -> None:
    """In a peer's process: runs out of memory in the middle of its second step's passes, the others within theirs."""
    forward = torch.nn.Embedding.forward
    calls = 0

    def fails(self: torch.nn.Embedding, tokens: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("injected")
        return forward(self, tokens)

    setattr(torch.nn.Embedding, "forward", fails)  # noqa: B010  # as mypy has it, a method is not assigned
    peers._peer(*arguments)


def test_a_peer_runs_out_of_memory_within_a_pass_and_the_first_process_knows_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "_peer", peer_out_of_memory)
    job = make_job(
        tmp_path, architecture="llama", recipe=make_recipe(global_batch=8), micro_batch=2, shard=Shard.ALWAYS
    )
    with pytest.raises(StartAgain, match=r"^cpu ran out of memory") as caught:
        train_all(job)
    assert caught.value.changes == {"micro_batch": 1, "gradient_checkpointing": False}
    assert multiprocessing.active_children() == []


def save(job: TrainJob) -> None:
    with together(job, ["cpu"]) as group, Trainer(job, group=group) as trainer:
        trainer.snapshot()


def test_the_first_process_fails_to_save_and_the_peer_that_is_sending_does_not_keep_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(layout: Sharded, tensor: DTensor) -> torch.Tensor:
        raise MemoryError("injected")

    # In this process alone.
    monkeypatch.setattr(Sharded, "_gathered", fails)
    with pytest.raises(MemoryError, match="injected"):
        save(make_job(tmp_path, shard=Shard.ALWAYS))
    assert multiprocessing.active_children() == []


def lose_the_peer(job: TrainJob) -> None:
    with together(job, ["cpu"]) as group, Trainer(job, group=group) as trainer:
        trainer.train_step()
        (peer,) = multiprocessing.active_children()
        assert peer.pid is not None
        os.kill(peer.pid, signal.SIGKILL)
        peer.join()
        trainer.train_step()
        trainer.snapshot()


def test_a_peer_that_is_killed_ends_the_task_with_an_error_and_leaves_nobody_behind(tmp_path: Path) -> None:
    with pytest.raises(InternalError, match="has ended"):
        lose_the_peer(make_job(tmp_path, shard=Shard.ALWAYS))
    assert multiprocessing.active_children() == []


def test_blocks_are_the_outermost_that_the_model_names_and_one_that_names_none_is_refused(tmp_path: Path) -> None:
    model, _ = load_model(make_job(tmp_path).model_dir, dropout=None, sequence_length=16)
    model._no_split_modules = {"GPT2Block", "GPT2MLP"}
    assert [type(block).__name__ for block in blocks_of(model)] == ["GPT2Block"] * 2
    model._no_split_modules = None
    with pytest.raises(InvalidArgument, match="--shard never") as caught:
        blocks_of(model)
    assert caught.value.field == "shard"


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[ProcessGroup]:
    group = ProcessGroup(rank=0, size=1, folder=tmp_path, cuda=False)
    yield group
    group.close()


@pytest.mark.parametrize(("spare", "is_shared"), [(1, False), (-1, True)])
def test_a_gpu_that_holds_the_training_state_and_a_pass_holds_the_whole_model(
    tmp_path: Path, group_of_one: ProcessGroup, monkeypatch: pytest.MonkeyPatch, spare: int, is_shared: bool
) -> None:
    job = make_job(tmp_path, architecture="llama")
    model, _ = load_model(job.model_dir, dropout=None, sequence_length=16)
    state = 16 * sum(p.numel() for p in model.parameters())
    a_pass = 16 * (34 * 32 * 2 + 12 * VOCABULARY)
    free = int((state + a_pass) / 0.92) + 16 * spare
    monkeypatch.setattr(layout_module, "_free_bytes", lambda device: free)
    layout = choose_layout(job, group_of_one, model, torch.device("cuda"), half=True)
    assert layout.is_sharded == is_shared
    for shard, always in ((Shard.NEVER, False), (Shard.ALWAYS, True)):
        layout = choose_layout(replace(job, shard=shard), group_of_one, model, torch.device("cuda"), half=True)
        assert layout.is_sharded == always


def test_in_bf16_a_shared_model_computes_what_a_whole_one_does_under_autocast(
    tmp_path: Path, group_of_one: ProcessGroup
) -> None:
    job, cpu = make_job(tmp_path, architecture="llama"), torch.device("cpu")
    tokens_bS = torch.arange(2 * 17).view(2, 17)
    losses, gradients = [], []
    for layout in (Layout(group_of_one), Sharded(group_of_one, half=True)):
        model, _ = load_model(job.model_dir, dropout=None, sequence_length=16)
        model = layout.place(model, cpu)
        loss = Loss(model, device=cpu, half=True, compiled=False)(tokens_bS)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    whole, shares = gradients
    assert losses[0] == losses[1]
    for name, gradient in whole.items():
        share = local(shares[name])
        assert share.dtype == torch.float32
        torch.testing.assert_close(share, gradient, rtol=0.01, atol=1e-6 * float(gradient.abs().max()))
        if "norm" in name:
            # Blocks are gathered in bf16, and so are their gradients; the last norm is not.
            assert torch.equal(share, share.bfloat16().float()) == (".layers." in name), name
