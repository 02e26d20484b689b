"""Trains a segment of somebody else's task again, and tells how far the weights come out from theirs.

Not covered: where the files come from, and what a deviation means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from cbtm_common.errors import IntegrityError
from cbtm_common.places import places
from cbtm_worker.train.checkpoint import write_checkpoint
from cbtm_worker.train.computation import Computation
from cbtm_worker.train.job import TrainJob
from cbtm_worker.train.trainer import Trainer


def replay(
    job: TrainJob, *, end_step: int, directory: Path, threads: int, before_step: Callable[[int], bool]
) -> Computation | None:
    """Trains to `end_step` and writes the checkpoint to `directory`; how it was computed.

    `threads` of torch on a CPU, those of the original; 0 leaves them. `before_step` is told the steps done, and breaks
    off with False: None then.
    """
    ours = torch.get_num_threads()
    if threads and torch.device(job.device).type == "cpu":
        torch.set_num_threads(threads)
    try:
        with Trainer(job) as trainer:
            while trainer.step < end_step:
                if not before_step(trainer.step):
                    return None
                trainer.train_step()
            final = end_step == trainer.total_steps
            write_checkpoint(trainer.snapshot(final=final), directory, final=final)
            return trainer.computation
    finally:
        torch.set_num_threads(ours)


def deviation(ours: Path, theirs: Path, base: Path) -> float:
    """|w' - w| / |w - w0| over all weights of three model directories: ours, theirs, and where both began.

    Infinite when they did not move, or have other tensors. Raises IntegrityError for files that cannot be read.
    """
    try:
        ours_in, theirs_in, base_in = _places(ours), _places(theirs), _places(base)
        if ours_in.keys() != theirs_in.keys():
            return math.inf
        apart = moved = 0.0
        for name in ours_in:
            mine, other = _read(ours_in[name], name), _read(theirs_in[name], name)
            if mine.shape != other.shape:
                return math.inf
            apart += float((mine - other).square().sum())
            # Tied weights may be written under one of their names.
            if name in base_in:
                moved += float((other - _read(base_in[name], name)).square().sum())
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"weights cannot be read: {error}") from error
    return math.sqrt(apart / moved) if moved > 0 else math.inf


def sampled(directory: Path) -> dict[str, bytes]:
    """Of each tensor of floats in a model directory, its values at `cbtm_common.places`: float32, little-endian."""
    found = {}
    for name, path in _places(directory).items():
        with safe_open(path, framework="pt") as file:
            values = file.get_tensor(name).flatten()
        if values.is_floating_point():
            found[name] = values[places(len(values))].float().numpy().astype("<f4").tobytes()
    return found


def _places(directory: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    return {name: path for path in sorted(directory.glob("*.safetensors")) for name in _names(path)}


def _names(path: Path) -> Iterator[str]:
    with safe_open(path, framework="pt") as file:
        yield from file.keys()


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor.double()
