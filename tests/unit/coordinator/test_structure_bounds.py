"""How far weights may move: no optimizer moves them further, and what is beyond is told with its bounds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm_common.recipe import OptimizerRecipe
from cbtm_coordinator.structure.architecture import Size
from cbtm_coordinator.structure.bounds import (
    FINE,
    REACH_SLACK,
    Verdict,
    judge_moments,
    judge_size,
    reach,
    shrink,
    update_bound,
)


@given(
    gradients=st.lists(st.floats(-1e3, 1e3).filter(lambda g: g == 0 or abs(g) > 1e-6), min_size=1, max_size=60),
    betas=st.sampled_from([(0.9, 0.95), (0.9, 0.999), (0.0, 0.9), (0.5, 0.5), (0.95, 0.95)]),
)
@settings(max_examples=150, deadline=None)
def test_no_gradients_move_adam_beyond_its_bound(gradients: list[float], betas: tuple[float, float]) -> None:
    b1, b2 = betas
    most = update_bound(OptimizerRecipe(beta1=b1, beta2=b2))
    m = v = 0.0
    for step, gradient in enumerate(gradients, start=1):
        m, v = b1 * m + (1 - b1) * gradient, b2 * v + (1 - b2) * gradient**2
        update = 0.0 if v == 0 else (m / (1 - b1**step)) / math.sqrt(v / (1 - b2**step))
        assert abs(update) <= most * (1 + 1e-9)


def test_the_default_optimizer_moves_a_weight_by_little_more_than_its_rate() -> None:
    assert update_bound(OptimizerRecipe()) == pytest.approx(1.165, abs=1e-3)
    assert update_bound(OptimizerRecipe(beta1=0.99, beta2=0.9)) == math.inf
    assert reach(OptimizerRecipe(), learning_rate=0.5, steps=3) == pytest.approx(1.165 * 1.5 * REACH_SLACK, rel=1e-3)


def judge(
    rms: float, *, before: float = 1.0, start: float = 1.0, far: float = 0.01, subnormals: float = 0.0
) -> Verdict:
    return judge_size(Size(rms, subnormals), before=Size(before), start=Size(start), reach=far, shrink=1.0)


@pytest.mark.parametrize(
    ("rms", "given"),
    [
        (1.0, {}),
        (1.029, {}),
        (0.971, {}),
        (0.0, {"before": 0.0, "start": 0.0}),
        (0.01, {"before": 0.0, "start": 0.0}),
        (9.9, {"before": 0.0, "start": 0.0, "far": 100.0}),
        (99.0, {"far": 1e9}),
        (0.011, {"far": 1e9}),
        (99.0, {"far": math.inf}),
    ],
)
def test_honest_sizes_pass(rms: float, given: dict[str, float]) -> None:
    assert judge(rms, **given) == FINE


@pytest.mark.parametrize(
    ("rms", "given"),
    [
        (1.031, {}),
        (0.969, {}),
        (0.0, {}),
        (0.011, {"before": 0.0, "start": 0.0}),
        (101.0, {"far": 1e9}),
        (0.009, {"far": 1e9}),
        (10.1, {"before": 0.0, "start": 0.0, "far": 1e9}),
        (math.inf, {"far": math.inf}),
    ],
)
def test_sizes_out_of_reach_are_told_with_what_is_allowed(rms: float, given: dict[str, float]) -> None:
    verdict = judge(rms, **given)
    assert verdict.reason == "norm"
    assert " to " in verdict.allowed


def test_weight_decay_may_shrink_what_it_may_shrink() -> None:
    left = shrink(OptimizerRecipe(weight_decay=0.5), learning_rate=0.1, steps=10)
    assert left == pytest.approx(0.95**10)
    sizes = {"before": Size(1.0), "start": Size(1.0), "reach": 0.0}
    assert judge_size(Size(left), shrink=left, **sizes) == FINE  # type: ignore[arg-type]
    assert judge_size(Size(0.9 * left), shrink=left, **sizes).reason == "norm"  # type: ignore[arg-type]
    assert shrink(OptimizerRecipe(weight_decay=100.0), learning_rate=1.0, steps=3) == 0


def test_subnormals_are_taken_as_far_as_the_base_model_has_them() -> None:
    assert judge(1.0, subnormals=0.009) == FINE
    assert judge(1.0, subnormals=0.011).reason == "subnormal"
    full = judge_size(Size(1.0, 0.3), before=Size(1.0), start=Size(1.0, 0.2), reach=0, shrink=1)
    assert full == FINE


def test_clipping_bounds_the_moments() -> None:
    """By the worst there can be: every gradient at the clip, always the same."""
    clipped = np.full(1000, 1 / math.sqrt(1000))
    worst = {"first_squares": float((clipped**2).sum()), "second": float((clipped**2).sum())}
    assert judge_moments(OptimizerRecipe(gradient_clip=1.0), **worst) == FINE
    assert judge_moments(OptimizerRecipe(gradient_clip=0.5), **worst).reason == "moments"
    assert judge_moments(OptimizerRecipe(gradient_clip=0.0), first_squares=1e30, second=1e30) == FINE
