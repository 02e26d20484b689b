"""What checkpoints cost: tokens a second with one every 30 s against none, and the pause that a snapshot makes.

    python -m bench.checkpointing [--quick]

A real trainer, a real coordinator, its HTTP object endpoint, and the worker's own heartbeat and uploader: each
checkpoint is written, hashed, sent, verified and committed while training goes on, and a spell lasts until its
checkpoint is committed, so that no work is put off beyond what is timed. The coordinator, in life another machine, has
one core to itself; worker and training share all others, which training keeps busy. Spells with and without checkpoints
alternate in one process, and each with one is compared with the halves before and after it, so that a drifting machine
does not decide. Linux.
"""

from __future__ import annotations

import argparse
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from bench.processes import RunningCoordinator, running_coordinator
from bench.real_run import make_shard
from bench.report import Report
from bench.simulated_workers import fill, make_workers
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.ids import cluster_id
from cbtm_common.recipe import Recipe
from cbtm_common.rpc import connect
from cbtm_common.transfer import Transfer
from cbtm_coordinator.store import Store
from cbtm_worker.heartbeat import Heartbeat
from cbtm_worker.session import Held, Session
from cbtm_worker.train import Snapshot, Trainer, TrainJob
from cbtm_worker.uploader import Uploader

VOCABULARY = 4096
SEQUENCE, BATCH = 128, 4


def make_model(folder: Path, *, hidden: int, layers: int) -> int:
    """A Llama-shaped model with random weights; its number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=SEQUENCE,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True, kw_only=True)
class Spell:
    """A stretch of training. With a checkpoint: seconds that its snapshot took, and until it was committed."""

    tokens_per_second: float
    pause: float = 0.0
    committed: float = 0.0


def spell(trainer: Trainer, seconds: float) -> Spell:
    started = time.perf_counter()
    tokens = 0
    while time.perf_counter() - started < seconds:
        tokens += trainer.train_step().tokens
    return Spell(tokens_per_second=tokens / (time.perf_counter() - started))


def spell_with_checkpoint(trainer: Trainer, seconds: float, uploader: Uploader) -> Spell:
    """Begins with a checkpoint; lasts until that is committed, and `seconds` at least."""
    started = time.perf_counter()
    step = trainer.step
    snapshot = trainer.snapshot()
    pause = time.perf_counter() - started
    uploader.submit(snapshot, step=step, final=False, metrics={})
    # It holds as much memory as a checkpoint has bytes.
    del snapshot
    tokens, committed = 0, 0.0
    while time.perf_counter() - started < seconds or not committed:
        tokens += trainer.train_step().tokens
        uploader.check()
        if not committed and uploader.committed_step == step:
            committed = time.perf_counter() - started
    return Spell(tokens_per_second=tokens / (time.perf_counter() - started), pause=pause, committed=committed)


def plain_copy_seconds(snapshot: Snapshot) -> float:
    """The same bytes copied by torch, into memory that is there already."""
    tensors = {t.data_ptr(): t for t in [*snapshot.weights.values(), *(snapshot.optimizer or {}).values()]}
    targets = [t.clone() for t in tensors.values()]
    started = time.perf_counter()
    for target, source in zip(targets, tensors.values(), strict=True):
        target.copy_(source)
    return time.perf_counter() - started


def measure(report: Report, coordinator: RunningCoordinator, scratch: Path, *, quick: bool, repetitions: int) -> None:
    hidden, layers = (256, 4) if quick else (384, 6)
    interval = 6.0 if quick else 30.0
    parameters = make_model(scratch / "model", hidden=hidden, layers=layers)
    make_shard(scratch / "shard.safetensors", vocabulary=VOCABULARY)
    store = Store(f"sqlite:///{coordinator.data_dir / 'registry.db'}")
    run_id = fill(store, open_tasks=1, name="checkpointing")
    (worker,) = make_workers(store, 1, coordinator.data_dir)
    store.close()
    recipe = Recipe(sequence_length=SEQUENCE, global_batch=BATCH, steps=1_000_000)
    with ExitStack() as stack:
        connection = stack.enter_context(connect(coordinator.address, security=coordinator.security))
        connection.credential = worker.secret
        session = Session(connection)
        answer = session.acquire(pb.Hardware(device_type="cpu"), "")
        held = Held(lease_id=answer.lease.id, epoch=answer.lease.epoch)
        transfer = stack.enter_context(Transfer(base_url=coordinator.http_url, base_tls=connection.http_context))
        heartbeat = Heartbeat(session, held, answer.spec.policy)
        heartbeat.start()
        stack.callback(heartbeat.close)
        uploader = Uploader(session, held, heartbeat, transfer, scratch / "task")
        stack.callback(uploader.close)
        trainer = stack.enter_context(
            Trainer(
                TrainJob(
                    recipe=recipe,
                    task_id=answer.spec.task.id,
                    kind="expert",
                    total_steps=1_000_000,
                    model_dir=scratch / "model",
                    shard_paths=[scratch / "shard.safetensors"],
                    data_key=cluster_id(run_id, 0),
                )
            )
        )
        trainer.train_step()
        # The first checkpoint makes connections, and imports.
        spell_with_checkpoint(trainer, 2.0, uploader)
        ratios, pauses, committed = [], [], []
        for _ in range(repetitions):
            before = spell(trainer, interval / 2)
            with_one = spell_with_checkpoint(trainer, interval, uploader)
            after = spell(trainer, interval / 2)
            ratios.append(2 * with_one.tokens_per_second / (before.tokens_per_second + after.tokens_per_second))
            pauses.append(with_one.pause)
            committed.append(with_one.committed)
        snapshot = trainer.snapshot()
        copied = float(np.median([plain_copy_seconds(snapshot) for _ in range(3)]))
    megabytes = snapshot.nbytes / 2**20
    report.add(
        f"tokens/s with a checkpoint every {interval:.0f} s, of without", float(np.median(ratios)), "x", bar=0.97
    )
    report.add("pause of one snapshot", 1000 * float(np.median(pauses)), "ms")
    report.add("a plain copy of the same bytes", 1000 * copied, "ms")
    report.add("pause against the plain copy", float(np.median(pauses)) / copied, "x")
    report.add("from a snapshot to its commit", float(np.median(committed)), "s", bar=interval, sense="at most")
    report.add("size of a checkpoint", megabytes, "MiB")
    report.add("parameters", parameters, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller model and shorter spells, under 60 s")
    parser.add_argument("--repetitions", type=int, help="spells with a checkpoint; 7, or 3 with --quick")
    options = parser.parse_args()
    *ours, last = sorted(os.sched_getaffinity(0))
    if not ours:
        parser.error("two cores are needed, one of them for the coordinator")
    os.sched_setaffinity(0, ours)
    torch.set_num_threads(len(ours))
    report = Report(bench="checkpointing")
    with TemporaryDirectory() as folder, running_coordinator(Path(folder) / "coordinator", cores=[last]) as coordinator:
        measure(
            report,
            coordinator,
            Path(folder),
            quick=options.quick,
            repetitions=options.repetitions or (3 if options.quick else 7),
        )
    report.finish()


if __name__ == "__main__":
    main()
