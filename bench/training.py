"""Training as a worker does it, against the loop that a user would write: tokens a second.

    python -m bench.training [--quick] [--repetitions N]

The worker's side is all of it: `cbtm-worker`'s own loop takes a task from a real coordinator, fetches its files,
trains, renews its lease each second, and writes, sends and commits checkpoints in the background, one in a spell of
40 s, where a real run has one in ten minutes. Rated is what lies between its first tenth of steps and its last step.
The rivals (`bench.rivals`) train the same shape on the same tokens with none of that: transformers' own model, and a
nanoGPT-style one. Spells alternate in one process, and the worker's is compared with those before and after it.

On a CPU, the coordinator, in life another machine, has one core to itself, and all training the others. On CUDA:
GPT-2 of 124 M and 350 M parameters, bf16, and the model FLOP utilisation (6 N + 12 layers·width·sequence FLOPs a token,
Chowdhery et al., 2022, "PaLM", appendix B) of the card's dense bf16 peak. Linux.
"""

from __future__ import annotations

import argparse
import io
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.console import Console

from bench.processes import RunningCoordinator, running_coordinator
from bench.real_run import make_run, make_shard
from bench.report import Report
from bench.rivals import BareModel, NanoGPT, Shape, rival_loop
from cbtm_common.recipe import LeaseRecipe, Recipe
from cbtm_common.rpc import connect
from cbtm_worker.config import WorkerConfig
from cbtm_worker.display import Display, TaskView
from cbtm_worker.loop import join

# Dense bf16 peak in TFLOPs, from the makers' data sheets, by a part of the card's name.
PEAK_TFLOPS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "4090": 165,
    "3090": 71,
}
CPU_QUICK = Shape(layers=4, heads=4, width=256, vocabulary=4096, sequence=128, global_batch=4, micro_batch=4)
CPU = Shape(layers=6, heads=6, width=384, vocabulary=4096, sequence=256, global_batch=4, micro_batch=4)
CUDA = {
    "124 M": Shape(layers=12, heads=12, width=768, vocabulary=50_304, sequence=1024, global_batch=128, micro_batch=32),
    "350 M": Shape(layers=24, heads=16, width=1024, vocabulary=50_304, sequence=1024, global_batch=128, micro_batch=16),
}


class Recorder(Display):
    """Notes when each step was told of, and how often a checkpoint was committed."""

    def __init__(self) -> None:
        super().__init__(Console(file=io.StringIO()))
        self.marks: list[tuple[float, int]] = []
        self.saved: set[int] = set()

    def show(self, view: TaskView) -> None:
        if view.phase == "train" and view.loss is not None:
            self.marks.append((time.perf_counter(), view.step))
            self.saved.add(view.saved_step)


@dataclass(frozen=True, kw_only=True)
class Spell:
    tokens_per_second: float
    # Committed while it trained.
    checkpoints: int


class WorkerSide:
    """One task of a run after another, each by `cbtm-worker`'s loop."""

    def __init__(self, coordinator: RunningCoordinator, folder: Path, run: str, shape: Shape, device: str) -> None:
        self._shape = shape
        token = (coordinator.data_dir / "join.token").read_text("utf-8").strip()
        self._config = WorkerConfig(
            coordinator=coordinator.address,
            token=token,
            cache_dir=folder,
            device=device,
            name="bench",
            run=run,
            max_tasks=1,
            until_idle=True,
            micro_batch=shape.micro_batch if device != "cpu" else None,
        )

    def spell(self) -> Spell:
        recorder = Recorder()
        if join(self._config, threading.Event(), recorder) != 1:
            raise RuntimeError(f"the worker did not finish its task:\n{recorder.console.file.getvalue()}")  # type: ignore[attr-defined]
        last, steps = recorder.marks[-1]
        first, begun = next(mark for mark in recorder.marks if 10 * mark[1] >= steps)
        rate = (steps - begun) * self._shape.tokens / (last - first)
        return Spell(tokens_per_second=rate, checkpoints=len(recorder.saved - {0}))


def save_model(folder: Path, shape: Shape) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_positions=shape.sequence,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)


def flops_per_token(shape: Shape, parameters: int) -> float:
    without_positions = parameters - shape.sequence * shape.width
    return 6 * without_positions + 12 * shape.layers * shape.width * shape.sequence


def peak_flops(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def measure(
    report: Report,
    coordinator: RunningCoordinator,
    folder: Path,
    what: str,
    shape: Shape,
    *,
    seconds: float,
    turns: int,
) -> None:
    """Figures of one shape; `seconds` is about what a spell takes."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    save_model(folder / "model", shape)
    make_shard(folder / "shard", vocabulary=shape.vocabulary)
    nano_model = NanoGPT(shape)
    parameters = sum(p.numel() for p in nano_model.parameters())
    bare = rival_loop(BareModel(folder / "model"), shape, folder / "shard", device)
    nano = rival_loop(nano_model, shape, folder / "shard", device)
    steps = max(20, round(seconds * bare(5) / shape.tokens))
    recipe = Recipe(
        sequence_length=shape.sequence,
        global_batch=shape.global_batch,
        steps=steps,
        lease=LeaseRecipe(
            lease_seconds=60, renew_seconds=1, checkpoint_seconds=0.6 * seconds, max_checkpoint_seconds=0.6 * seconds
        ),
    )
    admin_token = (coordinator.data_dir / "admin.token").read_text("utf-8").strip()
    with connect(coordinator.address, token=admin_token) as admin:
        run = make_run(
            admin,
            folder / "run",
            name=f"training-{parameters}",
            clusters=turns,
            recipe=recipe,
            model=folder / "model",
            vocabulary=shape.vocabulary,
        )
    worker = WorkerSide(coordinator, folder / "cache", run.name, shape, str(device))
    against_bare, against_nano, spells = [], [], []
    part = max(1, steps // 3)
    for _ in range(turns):
        bare_before, nano_before = bare(part), nano(part)
        spells.append(worker.spell())
        nano_after, bare_after = nano(part), bare(part)
        ours = spells[-1].tokens_per_second
        against_bare.append(2 * ours / (bare_before + bare_after))
        against_nano.append(2 * ours / (nano_before + nano_after))
    rate = float(np.median([s.tokens_per_second for s in spells]))
    report.add(f"{what}: worker, of the bare loop", float(np.median(against_bare)), "x", bar=None if cuda else 0.97)
    report.add(
        f"{what}: worker, of a nanoGPT-style loop", float(np.median(against_nano)), "x", bar=1.0 if cuda else None
    )
    report.add(f"{what}: worker", rate, "tokens/s")
    report.add(f"{what}: checkpoints committed in a spell", min(s.checkpoints for s in spells), "", bar=1)
    report.add(f"{what}: parameters", parameters, "")
    if not cuda:
        return
    peak = peak_flops(device)
    if peak is None:
        print(f"no model FLOP utilisation: the peak of {torch.cuda.get_device_name(device)} is not known here")
    else:
        report.add(f"{what}: model FLOP utilisation", rate * flops_per_token(shape, parameters) / peak, "", bar=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller model and shorter spells, under 60 s on a CPU")
    parser.add_argument("--repetitions", type=int, help="spells of the worker for each model; 5, or 3 with --quick")
    options = parser.parse_args()
    *ours, last = sorted(os.sched_getaffinity(0))
    if not ours:
        parser.error("two cores are needed, one of them for the coordinator")
    os.sched_setaffinity(0, ours)
    torch.set_num_threads(len(ours))
    shapes = CUDA if torch.cuda.is_available() else {"CPU": CPU_QUICK if options.quick else CPU}
    report = Report(bench="training")
    for number, (what, shape) in enumerate(shapes.items()):
        with TemporaryDirectory() as name, running_coordinator(Path(name) / "coordinator", cores=[last]) as coordinator:
            measure(
                report,
                coordinator,
                Path(name) / str(number),
                what,
                shape,
                seconds=5.0 if options.quick else 40.0,
                turns=options.repetitions or (3 if options.quick else 5),
            )
    report.finish()


if __name__ == "__main__":
    main()
