"""Calibration: its grid against the ensemble's own perplexities, what it chooses, and whom that reaches."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.ensembles import build, learned_router, make_parts, random_texts

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", params=["centroid", "learned"])
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    parts = make_parts(tmp_path_factory.mktemp(request.param), experts=4)
    return build(parts if request.param == "centroid" else replace(parts, router=learned_router(parts.router)))


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Some within the first re-routing, some well beyond the last."""
    return [*random_texts(3, seed=3), *random_texts(3, seed=4, words=(20, 40))]


@pytest.fixture(scope="module")
def scored(model: Any, texts: list[str]) -> Any:
    from cbtm import score_documents

    return score_documents(model, texts)


def test_a_point_of_the_grid_is_the_perplexity_of_an_ensemble_that_is_routed_so(
    model: Any, texts: list[str], scored: Any
) -> None:
    from cbtm import routing_grid

    assert max(len(sequence.ids) for sequence in scored.sequences) > 60
    router = model.with_routing(top_k=1, interval=5, temperature=9.0).context_router
    grid = routing_grid(scored, router, top_k=[1, 2, 4], temperatures=[0.1, 0.4])
    assert len({(p.temperature, p.top_k, p.policy) for p in grid}) == len(grid) == 2 * 3 * 4
    for point in grid:
        view = model.with_routing(
            seed_below="never",
            top_k=point.top_k,
            temperature=point.temperature,
            interval=point.policy.interval,
            settle_after=point.policy.settle_after or "never",
        )
        assert point.perplexity == pytest.approx(view.perplexity(texts).perplexity, rel=1e-5)
        arrivals = 0
        for sequence in scored.sequences:
            kept = view.context_router.positions(sequence.ids, 1) > 0
            before = np.zeros(4, bool)
            for row in kept:
                arrivals += int((row & ~before).sum())
                before = row
        # Weights too small for a float are not seen by this count.
        assert point.arrivals == pytest.approx(1000 * arrivals / scored.tokens, rel=0.02)


def test_the_seed_stands_in_where_no_cluster_weighs_enough(model: Any, texts: list[str], scored: Any) -> None:
    from cbtm import InvalidArgument, RoutingPolicy, evaluate, routing_grid

    each = RoutingPolicy(name="each token")
    never, some, always = routing_grid(
        scored, model.context_router, top_k=[2], temperatures=[1.0], policies=[each], seed_below=[0.45, 1.1]
    )
    assert (never.seed_below, some.seed_below, always.seed_below) == (None, 0.45, 1.1)
    assert (never.seed_share, always.seed_share) == (0.0, 1.0)
    assert 0 < some.seed_share < 1
    view = model.with_routing(top_k=2, temperature=1.0)
    total, far = 0.0, 0
    for n, (text, sequence) in enumerate(zip(texts, scored.sequences, strict=True)):
        heaviest = view.with_routing(top_k="all").context_router.positions(sequence.ids, 1).max(axis=1)
        for weight, mixed, alone in zip(
            heaviest, view.score(text).token_log_probs, scored.others["seed"][n], strict=True
        ):
            total += alone if weight < 0.45 else mixed
            far += weight < 0.45
    assert some.perplexity == pytest.approx(math.exp(-total / scored.tokens), rel=1e-5)
    assert some.seed_share == pytest.approx(far / scored.tokens)
    seeded = view.with_routing(seed_below=0.45)
    found = seeded.perplexity(texts)
    assert found.perplexity == pytest.approx(some.perplexity, rel=1e-5)
    assert found.seed_share == pytest.approx(some.seed_share)
    assert sum(found.expert_share.values()) == pytest.approx(1 - some.seed_share)
    for told, plain in zip(seeded.route(texts), view.route(texts), strict=True):
        assert [w.cluster_id for w in told.weights] == [w.cluster_id for w in plain.weights]
        np.testing.assert_allclose([w.weight for w in told.weights], [w.weight for w in plain.weights], rtol=1e-9)
        heaviest = view.with_routing(top_k="all").route(told.text).top.weight
        assert told.seed_stands_in == (heaviest < 0.45)
        assert not plain.seed_stands_in
    evaluated = evaluate(seeded, scored)
    assert evaluated.perplexity["top2"] == pytest.approx(some.perplexity, rel=1e-5)
    assert (evaluated.seed_below, evaluated.seed_share) == (0.45, pytest.approx(some.seed_share))
    unseeded = replace(scored, others={})
    with pytest.raises(InvalidArgument, match="no seed"):
        routing_grid(unseeded, model.context_router, top_k=[1], temperatures=[1.0], seed_below=[0.5])
    with pytest.raises(InvalidArgument, match="seed_below: the seed was not scored"):
        evaluate(seeded, unseeded)


def test_documents_scored_once_serve_evaluations_with_any_routing(model: Any, texts: list[str], scored: Any) -> None:
    from cbtm import InvalidArgument, evaluate

    view = model.with_routing(settle_after=16, temperature=0.4)
    found = evaluate(view, scored)
    assert found == evaluate(view, texts)
    assert (found.settle_after, found.temperature) == (16, 0.4)
    assert found.perplexity["top2"] != pytest.approx(evaluate(model, scored).perplexity["top2"], rel=1e-6)
    with pytest.raises(InvalidArgument, match="baseline"):
        evaluate(view, scored, baseline=model)


def test_a_calibration_chooses_of_its_own_grid_for_the_k_asked_for(model: Any, texts: list[str], scored: Any) -> None:
    from cbtm import calibrate

    found = calibrate(model, texts, top_k=3)
    assert found.chosen in found.grid
    assert found.chosen.top_k == 3
    assert {point.top_k for point in found.grid} == {1, 2, 3, 4}
    assert calibrate(model, scored, top_k=3) == found
    own = model.parts.router.temperature
    temperatures = sorted({point.temperature for point in found.grid})
    assert own in temperatures
    assert temperatures[0] == pytest.approx(own / 8)
    assert calibrate(model, scored).chosen.top_k == model.parts.recipe.routing.top_k
    bounds = [p.perplexity for p in found.grid if p.top_k == 3]
    assert min(bounds) <= found.chosen.perplexity <= 1.001 * min(bounds)


def test_one_expert_and_experts_that_are_missing_are_no_grounds_to_choose_by(tmp_path: Path) -> None:
    from cbtm import InvalidState, calibrate

    with pytest.raises(InvalidState, match="one expert"):
        calibrate(build(make_parts(tmp_path / "one", experts=1, top_k=1)), ["river"])
    with pytest.raises(InvalidState, match="1 of 3 experts"):
        calibrate(build(make_parts(tmp_path / "some", experts=3, missing=[1])), ["river"])


def test_what_a_run_was_calibrated_to_is_its_ensembles_default_and_is_saved_with_it(tmp_path: Path) -> None:
    from cbtm import Ensemble
    from cbtm_common.run_routing import RunRouting

    calibrated = RunRouting(
        temperature=0.7,
        top_k=3,
        interval=16,
        settle_after=32,
        seed_below=0.4,
        clustering="0" * 64,
        documents=1,
        tokens=1,
        perplexity=2,
    )
    parts = replace(make_parts(tmp_path, experts=4, top_k=2), calibrated=calibrated)
    routing = build(parts).routing
    assert (routing.top_k, routing.temperature, routing.interval, routing.settle_after) == (3, 0.7, 16, 32)
    told = build(parts, top_k=1, temperature=0.2).routing
    assert (told.top_k, told.temperature, told.interval, told.settle_after) == (1, 0.2, 16, 32)
    assert routing.seed_below == told.seed_below == 0.4
    build(parts).save(tmp_path / "saved")
    with Ensemble.load(tmp_path / "saved") as loaded:
        assert loaded.routing == routing
        assert loaded.parts.calibrated == calibrated
