"""What a calibration chooses of a grid."""

from __future__ import annotations

import pytest

from cbtm._calibrate import choose
from cbtm._routing_grid import POLICIES, GridPoint

_ONCE_16, _ONCE_32, _EACH_16, _EACH = (policy.name for policy in POLICIES)


def grid_of(values: dict[tuple[int, str, float], float]) -> list[GridPoint]:
    policies = {policy.name: policy for policy in POLICIES}
    return [
        GridPoint(temperature=t, top_k=k, policy=policies[name], perplexity=value, arrivals=0)
        for (k, name, t), value in values.items()
    ]


def test_of_policies_as_good_as_the_best_the_cheapest_is_chosen_at_its_best_temperature() -> None:
    values = {(2, _ONCE_16, t): 20.5 for t in (1.0, 2.0, 3.0)}
    values |= {(2, _EACH_16, 1.0): 20.019, (2, _EACH_16, 2.0): 20.015, (2, _EACH_16, 3.0): 30.0}
    values |= {(2, _EACH, 1.0): 20.0, (2, _EACH, 2.0): 20.1, (2, _EACH, 3.0): 20.1}
    chosen, reason = choose(grid_of({**values, (1, _ONCE_16, 1.0): 1.0}), top_k=2)
    assert (chosen.policy.name, chosen.temperature) == (_EACH_16, 2.0)
    assert "within 0.1 %" in reason
    assert "20.000 (each token)" in reason


@pytest.mark.parametrize(("near", "policy"), [(20.019, _ONCE_32), (20.021, _EACH)])
def test_a_cheaper_policy_may_cost_a_thousandth_and_no_more(near: float, policy: str) -> None:
    chosen, _ = choose(grid_of({(4, _EACH, 1.0): 20.0, (4, _ONCE_32, 1.0): near}), top_k=4)
    assert chosen.policy.name == policy


def test_one_expert_takes_the_temperature_that_is_best_for_two() -> None:
    values = {(1, name, t): 10.0 - t * 1e-9 for name in (_ONCE_16, _EACH) for t in (1.0, 2.0, 3.0, 4.0)}
    values |= {(2, _ONCE_16, 1.0): 9.9, (2, _ONCE_16, 2.0): 9.6, (2, _ONCE_16, 3.0): 9.8, (2, _ONCE_16, 4.0): 9.9}
    values |= {(2, _EACH, t): 8.0 + t for t in (1.0, 2.0, 3.0, 4.0)}
    chosen, reason = choose(grid_of(values), top_k=1)
    assert (chosen.top_k, chosen.policy.name, chosen.temperature) == (1, _ONCE_16, 2.0)
    assert "best for two" in reason


def test_a_best_temperature_at_the_end_of_the_grid_is_told() -> None:
    values = {(2, _EACH, 1.0): 10.0, (2, _EACH, 2.0): 9.0, (2, _EACH, 3.0): 8.0}
    assert "look beyond" in choose(grid_of(values), top_k=2)[1]
    assert "look beyond" not in choose(grid_of({**values, (2, _EACH, 4.0): 9.0}), top_k=2)[1]


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(("better", "threshold"), [(9.985, 0.5), (9.991, None), (10.5, None)])
def test_the_seed_stands_in_where_that_is_better_by_more_than_a_thousandth(
    top_k: int, better: float, threshold: float | None
) -> None:
    grid = grid_of({(k, _EACH, t): 10.0 + abs(t - 2) for k in {top_k, 2} for t in (1.0, 2.0, 3.0)})
    # Thresholds are of weights, and so of one temperature: what the seed gives at another is not looked at.
    seeded = [
        GridPoint(
            temperature=t,
            top_k=top_k,
            policy=POLICIES[3],
            perplexity=value,
            arrivals=0,
            seed_below=below,
            seed_share=0.5,
        )
        for t, below, value in [(2.0, 0.5, better), (2.0, 0.7, better + 1), (1.0, 0.5, 1.0)]
    ]
    chosen, reason = choose([*seeded, *grid], top_k=top_k)
    assert (chosen.temperature, chosen.seed_below) == (2.0, threshold)
    assert ("it is 10.000 where the seed never stands in" in reason) == (threshold is not None)


def test_a_cheap_policy_that_the_seed_makes_as_good_is_chosen() -> None:
    grid = grid_of({(2, _EACH, 1.0): 10.0, (2, _ONCE_16, 1.0): 12.0})
    seeded = GridPoint(
        temperature=1.0, top_k=2, policy=POLICIES[0], perplexity=10.005, arrivals=0, seed_below=0.5, seed_share=0.5
    )
    assert choose([*grid, seeded], top_k=2)[0] is seeded
