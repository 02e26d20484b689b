"""Advice before a run: what it is drawn from, what bounds it, how sure it says it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cbtm_common.errors import InvalidArgument
from cbtm_common.recipe import Recipe
from cbtm_coordinator.cli import app
from cbtm_coordinator.clustering.corpus import open_corpus
from cbtm_coordinator.planning.advice import Confidence, Question, advise
from cbtm_coordinator.planning.measurements import PUBLISHED, Measurement, Published, measurements
from cbtm_coordinator.planning.survey import survey
from scripts.generate_measurements import OUT, distil, text

PARAMETERS, TOKENS = 1_000_000, 8_000_000
QUESTION = Question(
    budget_tokens=TOKENS,
    parameters=PARAMETERS,
    documents=100_000,
    corpus_tokens=2 * TOKENS,
    pretrained=False,
    recipe=Recipe(sequence_length=128, global_batch=2),
)


def measured(clusters: int, gain: float, **fields: Any) -> Measurement:
    values: dict[str, Any] = {
        "source": "a study", "parameters": PARAMETERS, "train_tokens": TOKENS, "seeds": 3, "protocol": "B",
        "seed_fraction": 0.75, "router": "learned", "policy": "each token", "k": 1, "dense_perplexity": 100.0,
    }  # fmt: skip
    return Measurement(clusters=clusters, perplexity=100 * (1 - gain), **{**values, **fields})


STUDY = [
    measured(4, 0.06),
    measured(4, 0.05, policy="once after 16"),
    measured(16, 0.12),
    measured(16, 0.09, policy="once after 16"),
    measured(16, 0.07, seed_fraction=0.5),
]


def test_at_the_scale_of_a_study_its_best_clusters_and_seed_phase_are_advised() -> None:
    advice = advise(QUESTION, STUDY, [])
    assert (advice.clusters, advice.seed_fraction, advice.confidence) == (16, 0.75, Confidence.HIGH)
    assert advice.gain == pytest.approx((0.09, 0.12))
    assert advice.expert_tokens == TOKENS // 4 // 16


def test_steps_and_seed_phase_spend_the_budget() -> None:
    advice = advise(QUESTION, STUDY, [])
    phase = QUESTION.recipe.seed_phase.model_copy(update={"fraction": advice.seed_fraction})
    recipe = QUESTION.recipe.model_copy(update={"steps": advice.steps, "seed_phase": phase})
    assert recipe.budget_tokens(advice.clusters, from_scratch=True) == pytest.approx(TOKENS, rel=0.01)


def test_what_is_no_fair_comparison_is_not_advised_by() -> None:
    unfair = [
        measured(64, 0.9, protocol="A"),
        measured(64, 0.9, router="centroid"),
        measured(64, 0.9, k=2),
    ]
    assert advise(QUESTION, [*STUDY, *unfair], []) == advise(QUESTION, STUDY, [])


def test_more_clusters_than_were_measured_are_never_advised() -> None:
    wide = replace(QUESTION, budget_tokens=2 * TOKENS, documents=10**9)
    assert advise(wide, STUDY, []).clusters == 16


@pytest.mark.parametrize(("documents", "clusters"), [(1600, 16), (1599, 8), (800, 8), (400, 4), (200, 2)])
def test_each_cluster_keeps_a_document_to_choose_by_and_one_to_report(documents: int, clusters: int) -> None:
    advice = advise(replace(QUESTION, documents=documents), STUDY, [])
    assert advice.clusters == clusters
    assert documents * QUESTION.recipe.held_out_fraction / clusters >= 2


def test_between_measured_clusters_the_gain_is_interpolated() -> None:
    gain = advise(replace(QUESTION, documents=800), STUDY, []).gain
    assert gain == pytest.approx((0.07, 0.09))
    assert advise(replace(QUESTION, documents=200), STUDY, []).gain == pytest.approx((0.025, 0.03))


def test_an_expert_has_no_fewer_tokens_a_parameter_than_were_seen_to_gain() -> None:
    assert advise(replace(QUESTION, parameters=2 * PARAMETERS), STUDY, []).clusters == 8
    alone = advise(replace(QUESTION, parameters=20 * PARAMETERS), STUDY, [])
    assert (alone.clusters, alone.gain) == (1, None)
    assert alone.steps == TOKENS // 256


def test_experts_that_lost_to_dense_are_not_advised() -> None:
    study = [measured(4, 0.02), measured(16, -0.01)]
    assert advise(QUESTION, study, []).clusters == 4


@pytest.mark.parametrize(
    ("change", "seeds", "confidence"),
    [
        ({}, 3, Confidence.HIGH),
        ({}, 1, Confidence.MEDIUM),
        ({"budget_tokens": 5 * TOKENS}, 3, Confidence.MEDIUM),
        ({"budget_tokens": 50 * TOKENS}, 3, Confidence.LOW),
        ({"parameters": PARAMETERS // 50}, 3, Confidence.LOW),
        ({"pretrained": True}, 3, Confidence.LOW),
    ],
)
def test_it_says_how_far_the_question_lies_from_what_was_measured(
    change: dict[str, Any], seeds: int, confidence: Confidence
) -> None:
    study = [replace(one, seeds=seeds) for one in STUDY]
    advice = advise(replace(QUESTION, **change), study, [])
    assert advice.confidence is confidence
    assert any("at a tenth" in warning for warning in advice.warnings) == (confidence is Confidence.LOW)


def test_a_pretrained_model_leaves_the_whole_budget_to_the_experts() -> None:
    advice = advise(replace(QUESTION, pretrained=True), STUDY, [])
    assert advice.seed_fraction == 0.0
    assert advice.expert_tokens == TOKENS // advice.clusters


def test_near_a_papers_scale_its_figures_are_advised_by_with_low_confidence() -> None:
    paper = [Published(source="a paper", parameters=10**9, clusters=c, gain=g) for c, g in ((4, 0.05), (32, 0.15))]
    question = replace(QUESTION, parameters=10**9, budget_tokens=10**11)
    advice = advise(question, STUDY, paper)
    assert (advice.clusters, advice.gain) == (32, (0.15, 0.15))
    assert (advice.confidence, advice.seed_fraction) == (Confidence.LOW, 0.75)
    assert "a paper" in advice.reasons[0]


def test_a_corpus_read_over_and_over_and_an_expert_of_few_steps_are_told() -> None:
    question = replace(QUESTION, corpus_tokens=TOKENS // 3, recipe=Recipe(sequence_length=2048, global_batch=32))
    assert advise(question, STUDY, []).warnings[0] == "this budget reads the corpus 3.0 times over"
    assert "steps are few" in advise(question, STUDY, []).warnings[1]


def test_what_is_shipped_is_what_the_results_say_and_can_be_advised_by() -> None:
    assert OUT.read_text("utf-8") == text(), "run python scripts/generate_measurements.py"
    shipped = measurements()
    assert any(one.gain > 0 for one in shipped)
    for one in (*shipped, *PUBLISHED):
        assert -1 < one.gain < 0.5
    assert advise(QUESTION, shipped, PUBLISHED).clusters > 1


def test_seeds_are_averaged_and_what_no_router_can_do_is_left_out() -> None:
    row = {"protocol": "B", "clusters": 8, "seed_fraction": 0.5, "random": False, "policy": "each 16", "k": 1}
    rows = [
        {**row, "router": "learned", "test": 10.0, "dense": 20.0, "seed": 0},
        {**row, "router": "learned", "test": 12.0, "dense": 22.0, "seed": 1},
        {**row, "router": "oracle", "test": 1.0, "dense": 20.0},
        {**row, "router": "learned", "random": True, "test": 30.0, "dense": 20.0},
        {**row, "router": "learned", "k": 0, "test": 9.0, "dense": 20.0},
    ]
    (found,) = distil([{"size": "s", "parameters": 1, "tokens": 2, "rows": rows}])
    assert (found["seeds"], found["perplexity"], found["dense_perplexity"]) == (2, 11.0, 21.0)


class Characters:
    """A tokenizer of two tokens a character."""

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[0] * (2 * len(one)) for one in texts]}


def test_a_corpus_is_counted_in_one_pass(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": "x" * 100}) + "\n" for _ in range(30)) + "no json\n")
    read: list[int] = []
    found = survey(open_corpus([str(path)]), Characters(), on_bytes=read.append)
    assert (found.documents, found.characters, found.bad_lines, found.sampled) == (30, 3000, 1, True)
    assert found.tokens == 2 * 3000 + 30
    assert sum(read) == found.size == path.stat().st_size
    guessed = survey(open_corpus([str(path)]), None)
    assert (guessed.tokens, guessed.sampled) == (750 + 30, False)


def test_the_command_advises_from_a_corpus_alone(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(900)))
    arguments = ["plan", "--corpus", str(path), "--budget", "7.4M", "--parameters", "1.09M"]
    said = json.loads(CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False).stdout)
    assert said["corpus"]["documents"] == 900
    assert said["question"]["budget_tokens"] == 7_400_000
    assert 2 <= said["advice"]["clusters"] <= 9
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False).stdout
    assert f"--clusters {said['advice']['clusters']}" in shown
    assert f"steps = {said['advice']['steps']}" in shown
    for wrong in ("many", "0", "-4M", ""):
        refused = CliRunner().invoke(app, [*arguments[:3], "--budget", wrong, "--parameters", "1M"]).exception
        assert isinstance(refused, InvalidArgument)
        assert refused.field == "budget"
