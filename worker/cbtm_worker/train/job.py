"""What a trainer is told, and what it tells back: plain values, no torch.

Scope: names and meanings that the worker's loop and the trainer share. Importing this module is cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

from cbtm_common.recipe import Recipe

TaskKind = Literal["seed", "expert"]


class Shard(StrEnum):
    """Whether the devices that train a task together hold a share of the model each, or all of it."""

    # A share where one device does not hold it all.
    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """One task's training. Everything above the line fixes the mathematics; below it is the worker's choice."""

    recipe: Recipe
    task_id: str
    kind: TaskKind
    # Optimizer steps of the whole task.
    total_steps: int
    # Hugging Face directory that training branches from; only its weights and config are read. Not read on a resume.
    model_dir: Path
    # Token shards, in the order that the coordinator lists them. Read until training ends: keep the files in place.
    shard_paths: list[Path]
    # Keys the order of the data and dropout: the cluster's id, or the run's id for a seed.
    data_key: str

    # --------------------------------------------------------------------------------------------------------------
    # A checkpoint's directory (model/, optimizer.safetensors, state.json) to go on from.
    resume_dir: Path | None = None
    # "cpu", "cuda", "cuda:1".
    device: str = "cpu"
    # Sequences a forward pass; the largest divisor of the global batch at or under it is used. None: as the checkpoint
    # was computed, or as was found to fit before, or by a probe of the device's memory.
    micro_batch: int | None = None
    # File that keeps what was found to fit.
    placement_cache: Path | None = None
    # Recompute activations in the backward pass: less memory, about a third more time. Turned on when even a
    # micro-batch of 1 does not fit.
    gradient_checkpointing: bool = False
    # torch.compile the model. None: on CUDA, and as the checkpoint was computed where a resume keeps its bits.
    compile: bool | None = None
    # Of a task that several devices train.
    shard: Shard = Shard.AUTO
    # Whether an operation on CUDA that has no deterministic form is refused at first. A sharded model, which cannot do
    # without it in the middle of a step, starts again with False.
    deterministic: bool = True


class StepResult:
    """One optimizer step. `loss` and `grad_norm` wait for the device when they are first read, the rest never does."""

    __slots__ = ("_values", "learning_rate", "seconds", "step", "tokens")

    def __init__(
        self,
        *,
        step: int,
        tokens: int,
        seconds: float,
        learning_rate: float,
        values: Callable[[], tuple[float, float]],
    ) -> None:
        # Steps done, this one included.
        self.step = step
        # Tokens that this step trained on.
        self.tokens = tokens
        # Wall time of the call. On CUDA the device runs up to a step behind, so average over several.
        self.seconds = seconds
        self.learning_rate = learning_rate
        self._values = values

    @property
    def loss(self) -> float:
        """Mean cross-entropy of the global batch before the step, in nats a token."""
        return self._values()[0]

    @property
    def grad_norm(self) -> float:
        """Global L2 norm of the gradient before clipping."""
        return self._values()[1]

    def __repr__(self) -> str:
        return f"StepResult(step={self.step}, tokens={self.tokens}, seconds={self.seconds:.3g})"
