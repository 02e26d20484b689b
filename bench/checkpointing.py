"""What checkpoints cost: tokens a second with one every 30 s against none, and the pause that a snapshot makes.

    python -m bench.checkpointing [--quick]

A real trainer on this machine's CPU, a real coordinator, its HTTP object endpoint, and the worker's own heartbeat and
uploader: each checkpoint is written, sent, verified and committed while training goes on. Spells with and without
checkpoints alternate in one process, and the ratio is taken pair by pair, so that a drifting machine does not decide.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bench.coordinator import fill, make_workers
from bench.processes import RunningCoordinator, running_coordinator
from bench.report import Report
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.ids import cluster_id
from cbtm_common.recipe import Recipe
from cbtm_common.rpc import connect
from cbtm_common.shards import write_shard
from cbtm_common.transfer import Transfer
from cbtm_coordinator.store import Store
from cbtm_worker.heartbeat import Heartbeat
from cbtm_worker.session import Held, Session
from cbtm_worker.train import Trainer, TrainJob
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


def make_shard(path: Path) -> None:
    ids = np.random.default_rng(0).integers(1, VOCABULARY, size=200_000)
    ids[999::1000] = 0
    write_shard(path, ids, np.arange(0, len(ids), 1000), vocab_size=VOCABULARY, eos_token_id=0)


def spell(trainer: Any, seconds: float, checkpoint: Any) -> tuple[float, list[float]]:
    """Trains for `seconds`: (tokens a second, pauses of the snapshots taken). `checkpoint()` begins the spell."""
    started = time.perf_counter()
    pauses = []
    if checkpoint is not None:
        checkpoint()
        pauses.append(time.perf_counter() - started)
    tokens = 0
    while time.perf_counter() - started < seconds:
        tokens += trainer.train_step().tokens
    return tokens / (time.perf_counter() - started), pauses


def plain_copy_seconds(snapshot: Any) -> float:
    """The same bytes copied by torch, into memory that is there already."""
    tensors = {t.data_ptr(): t for t in [*snapshot.weights.values(), *(snapshot.optimizer or {}).values()]}
    targets = [t.clone() for t in tensors.values()]
    started = time.perf_counter()
    for target, source in zip(targets, tensors.values(), strict=True):
        target.copy_(source)
    return time.perf_counter() - started


def measure(report: Report, coordinator: RunningCoordinator, scratch: Path, *, quick: bool) -> None:
    hidden, layers = (256, 4) if quick else (512, 8)
    interval = 6.0 if quick else 30.0
    pairs = 3 if quick else 5
    parameters = make_model(scratch / "model", hidden=hidden, layers=layers)
    make_shard(scratch / "shard.safetensors")
    store = Store(f"sqlite:///{coordinator.data_dir / 'registry.db'}")
    run_id = fill(store, open_tasks=1, name="checkpointing")
    (worker,) = make_workers(store, 1)
    store.close()
    recipe = Recipe(sequence_length=SEQUENCE, global_batch=BATCH, steps=1000)
    with ExitStack() as stack:
        connection = stack.enter_context(connect(coordinator.address, credential=worker.secret))
        session = Session(connection)
        answer = session.acquire(pb.Hardware(device_type="cpu"), "")
        held = Held(lease_id=answer.lease.id, epoch=answer.lease.epoch)
        transfer = stack.enter_context(Transfer(base_url=coordinator.http_url))
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
                    total_steps=1000,
                    model_dir=scratch / "model",
                    shard_paths=[scratch / "shard.safetensors"],
                    data_key=cluster_id(run_id, 0),
                )
            )
        )

        def checkpoint() -> None:
            uploader.submit(trainer.snapshot(), step=trainer.step, final=False, metrics={})

        trainer.train_step()
        spell(trainer, 2.0, None)
        ratios, pauses = [], []
        for _ in range(pairs):
            without, _ = spell(trainer, interval, None)
            with_one, found = spell(trainer, interval, checkpoint)
            uploader.flush()
            ratios.append(with_one / without)
            pauses += found
        snapshot = trainer.snapshot()
        copied = float(np.median([plain_copy_seconds(snapshot) for _ in range(3)]))
    megabytes = snapshot.nbytes / 2**20
    report.add(
        f"tokens/s with a checkpoint every {interval:.0f} s, of without", float(np.median(ratios)), "x", bar=0.97
    )
    report.add("pause of one snapshot", 1000 * float(np.median(pauses)), "ms")
    report.add("a plain copy of the same bytes", 1000 * copied, "ms")
    report.add("pause against the plain copy", float(np.median(pauses)) / copied, "x")
    report.add("size of a checkpoint", megabytes, "MiB")
    report.add("parameters", parameters, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller model and shorter spells, under 60 s")
    options = parser.parse_args()
    report = Report(bench="checkpointing")
    with TemporaryDirectory() as folder, running_coordinator(Path(folder) / "coordinator") as coordinator:
        measure(report, coordinator, Path(folder), quick=options.quick)
    report.finish()


if __name__ == "__main__":
    main()
