"""An ensemble whose experts come and go between calls: all at once or not at all, never in the midst of a text."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.ensembles import PlainSource, brute_force_log_probs, make_parts
from tests.support.models import EOS_TOKEN_ID, make_tiny_model

pytestmark = pytest.mark.integration


class LiveRun:
    """Parts of four clusters, of which the experts in `here` are accepted by now."""

    def __init__(self, root: Path, here: set[int]) -> None:
        self.all = make_parts(root, experts=4, top_k=2)
        self.here = here
        self.other: dict[int, PlainSource] = {}
        self.fails: Exception | None = None

    def parts(self) -> Any:
        if self.fails is not None:
            raise self.fails
        experts = {
            cluster.id: self.other.get(cluster.index, self.all.experts[cluster.id])
            for cluster in self.all.clusters
            if cluster.index in self.here
        }
        return dataclasses.replace(self.all, experts=experts, reload=self.parts)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("live")


@pytest.fixture
def run(root: Path) -> LiveRun:
    return LiveRun(root, {0, 2})


def open_run(run: LiveRun, **options: Any) -> Any:
    from cbtm._ensemble import Ensemble
    from cbtm._residency import Placement

    return Ensemble._of(run.parts(), Placement(), top_k=options.get("top_k"), temperature=None)


def check_against_brute_force(model: Any, top_k: int | None) -> None:
    ids = [EOS_TOKEN_ID, *model.encode("river stone theorem")]
    found = model.log_probs([ids]).numpy()[0, -1]
    np.testing.assert_allclose(found, brute_force_log_probs(model, ids, top_k=top_k), atol=1e-5)


def test_accepted_withdrawn_and_replaced_experts_are_taken_up_at_once(run: LiveRun, tmp_path: Path) -> None:
    from cbtm import ExpertChanges

    model = open_run(run, top_k="all")
    check_against_brute_force(model, None)
    loads = model.pool.loads
    kept = model.pool.get(1)
    assert not model.refresh()
    run.here = {1, 2, 3}
    assert model.refresh() == ExpertChanges(added=("run_x-c0001", "run_x-c0003"), removed=("run_x-c0000",))
    assert [c.index for c in model.clusters] == [1, 2, 3]
    assert model.missing_clusters == ("run_x-c0000",)
    assert model.pool.get(1) is kept, "an expert that stays is not loaded again"
    check_against_brute_force(model, None)
    assert model.pool.loads == loads + 2
    newer = make_tiny_model(tmp_path / "newer", vocab_size=300, seed=77, hidden_size=16, context=64)
    run.other[2] = PlainSource("expert 2", newer)
    assert model.refresh() == ExpertChanges(replaced=("run_x-c0002",))
    assert model.pool.get(1) is not kept
    check_against_brute_force(model, None)


def test_the_runs_top_k_counts_again_when_there_are_experts_enough(run: LiveRun) -> None:
    run.here = {3}
    model = open_run(run)
    assert model.routing.top_k == 1
    run.here = {0, 1, 3}
    model.refresh()
    assert model.routing.top_k == 2
    check_against_brute_force(model, 2)


def test_a_larger_top_k_is_as_many_as_are_left_and_comes_back(run: LiveRun) -> None:
    run.here = {0, 1, 2}
    model = open_run(run, top_k=3)
    for here, top_k in (({0}, 1), ({0, 1, 2, 3}, 3)):
        run.here = here
        model.refresh()
        assert model.routing.top_k == top_k


def test_fixed_weights_go_with_their_clusters(run: LiveRun) -> None:
    from cbtm import InvalidState

    model = open_run(run, top_k="all").with_routing(weights={"run_x-c0002": 3.0, "run_x-c0000": 1.0})
    run.here = {1, 2, 3}
    model.refresh()
    assert [w.cluster_id for w in model.route("river").weights] == ["run_x-c0002"]
    run.here = {1, 3}
    with pytest.raises(InvalidState, match="fixed weights"):
        model.refresh()
    assert [c.index for c in model.clusters] == [1, 2, 3]


def test_a_refresh_that_fails_leaves_everything_as_it_was(run: LiveRun, tmp_path: Path) -> None:
    from cbtm import InvalidArgument, InvalidState, Unavailable

    model = open_run(run)
    before = model.generate("river stone", max_new_tokens=8)
    alien = PlainSource("expert 3", make_tiny_model(tmp_path / "alien", architecture="gpt2", vocab_size=300))
    run.fails = Unavailable("no coordinator")
    with pytest.raises(Unavailable):
        model.refresh()
    run.fails, run.here, run.other[3] = None, {0, 3}, alien
    with pytest.raises(InvalidArgument, match="expert 3 and expert 0 do not fit together"):
        model.refresh()
    run.here = set()
    with pytest.raises(InvalidState, match="holds no expert"):
        model.refresh()
    assert [c.index for c in model.clusters] == [0, 2]
    assert model.generate("river stone", max_new_tokens=8) == before


def test_a_text_under_way_keeps_the_experts_it_began_with(run: LiveRun) -> None:
    import torch
    from transformers.generation.streamers import BaseStreamer

    from cbtm import CbtmForCausalLM

    model = CbtmForCausalLM.from_ensemble(open_run(run))
    ids = torch.tensor([[EOS_TOKEN_ID, *model.ensemble.encode("river stone")]])
    options: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **options)

    class RefreshAtFour(BaseStreamer):
        count = 0

        def put(self, value: Any) -> None:
            self.count += 1
            if self.count == 4:
                run.here = {1, 3}
                assert model.refresh()

        def end(self) -> None:
            pass

    assert model.generate(ids, **options, streamer=RefreshAtFour()).tolist() == expected.tolist()
    assert model.config.num_experts == 2
    assert [c.index for c in model.ensemble.clusters] == [1, 3]
    assert model.generate(ids, **options).tolist() != expected.tolist()
    check_against_brute_force(model.ensemble, 2)
    assert {source.name for source in model.ensemble.pool.residency.resident} >= {"expert 1", "expert 3"}


def test_a_saved_folder_does_not_change(run: LiveRun, tmp_path: Path) -> None:
    from cbtm import Ensemble, InvalidState

    open_run(run).save(tmp_path / "saved")
    with pytest.raises(InvalidState, match="from_coordinator"):
        Ensemble.load(tmp_path / "saved").refresh()
