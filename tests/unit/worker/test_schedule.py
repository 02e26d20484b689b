"""The learning rate of each step."""

from __future__ import annotations

import itertools
import math

import pytest

from cbtm_common.recipe import Decay, OptimizerRecipe, Recipe, ScheduleRecipe, SeedRecipe
from cbtm_worker.train.schedule import Schedule


def schedule(*, decay: Decay, warmup: int = 0, total: int = 10, final: float = 0.0) -> Schedule:
    return Schedule(peak=2.0, warmup_steps=warmup, total_steps=total, decay=decay, final_ratio=final)


def rates(s: Schedule) -> list[float]:
    return [s.learning_rate(step) for step in range(s.total_steps)]


def test_linear_decay_starts_at_the_peak_and_would_end_at_zero() -> None:
    assert rates(schedule(decay=Decay.LINEAR)) == pytest.approx([2.0 * (10 - n) / 10 for n in range(10)])
    assert schedule(decay=Decay.LINEAR).learning_rate(10) == 0


def test_warm_up_rises_to_the_peak_and_no_step_is_wasted_at_zero() -> None:
    assert rates(schedule(decay=Decay.CONSTANT, warmup=4, total=6)) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_cosine_is_halfway_down_halfway_through() -> None:
    s = schedule(decay=Decay.COSINE, warmup=2, total=12, final=0.1)
    assert s.learning_rate(2) == pytest.approx(2.0)
    assert s.learning_rate(7) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert s.learning_rate(12) == pytest.approx(0.2)


@pytest.mark.parametrize("decay", list(Decay))
def test_rates_after_warm_up_never_rise_and_stay_within_bounds(decay: Decay) -> None:
    after = rates(schedule(decay=decay, warmup=5, total=100, final=0.25))[5:]
    assert all(a >= b for a, b in itertools.pairwise(after))
    assert all(0.5 <= rate <= 2.0 for rate in after)


@pytest.mark.parametrize("decay", list(Decay))
def test_a_task_shorter_than_its_warm_up_only_warms_up(decay: Decay) -> None:
    assert rates(schedule(decay=decay, warmup=50, total=4)) == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_a_seed_has_its_own_peak_and_warm_up_and_an_expert_the_recipes() -> None:
    recipe = Recipe(
        optimizer=OptimizerRecipe(learning_rate=1e-4),
        schedule=ScheduleRecipe(warmup_steps=3, decay=Decay.COSINE, final_ratio=0.1),
        seed_phase=SeedRecipe(learning_rate=5e-4, warmup_steps=7),
    )
    seed, expert = Schedule.of(recipe, "seed", 100), Schedule.of(recipe, "expert", 50)
    assert (seed.peak, seed.warmup_steps, seed.total_steps) == (5e-4, 7, 100)
    assert (expert.peak, expert.warmup_steps, expert.total_steps) == (1e-4, 3, 50)
    assert seed.decay is expert.decay is Decay.COSINE


def test_a_seed_without_a_peak_of_its_own_takes_the_optimizers() -> None:
    assert Schedule.of(Recipe(), "seed", 10).peak == Recipe().optimizer.learning_rate
    assert math.isfinite(Schedule.of(Recipe(), "seed", 1).learning_rate(0))
