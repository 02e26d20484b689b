"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import assert_never

from cbtm_common.recipe import Decay, Recipe
from cbtm_worker.train.job import TaskKind


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up to `peak`, then decay that would reach `final_ratio`·peak at step `total_steps`."""

    peak: float
    warmup_steps: int
    total_steps: int
    decay: Decay
    final_ratio: float

    @classmethod
    def of(cls, recipe: Recipe, kind: TaskKind, total_steps: int) -> Schedule:
        """A seed has its own peak (if the recipe names one) and warm-up; the shape of the decay is the recipe's."""
        seed = kind == "seed"
        return cls(
            peak=recipe.peak_learning_rate(seed=seed),
            warmup_steps=recipe.seed_phase.warmup_steps if seed else recipe.schedule.warmup_steps,
            total_steps=total_steps,
            decay=recipe.schedule.decay,
            final_ratio=recipe.schedule.final_ratio,
        )

    def learning_rate(self, step: int) -> float:
        """Rate of step `step`, from 0. The first warm-up step is not 0, nor is the last step of a decay to 0."""
        warmup = min(self.warmup_steps, self.total_steps)
        if step < warmup:
            return self.peak * (step + 1) / warmup
        # 0 at the end of warm-up, 1 at total_steps.
        progress = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
        match self.decay:
            case Decay.CONSTANT:
                left = 1.0
            case Decay.LINEAR:
                left = 1.0 - progress
            case Decay.COSINE:
                left = 0.5 * (1.0 + math.cos(math.pi * progress))
            case _ as unknown:
                assert_never(unknown)
        return self.peak * (self.final_ratio + (1.0 - self.final_ratio) * left)
