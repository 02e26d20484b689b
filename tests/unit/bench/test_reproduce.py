"""The study's arithmetic, on numbers small enough to check by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.reproduce import mixing
from bench.reproduce.corpus import cut, parts
from bench.reproduce.findings import Findings, Row
from bench.reproduce.grid import SIZES, Phase, Plan, recipe, toml
from bench.reproduce.scores import Documents, RunScores
from bench.reproduce.show import markdown
from bench.reproduce.token_terms import written
from cbtm._scoring import TokenSequence
from cbtm_common.recipe import Recipe

# Three documents of 2, 3 and 1 scored tokens; the first is for choosing.
DOCUMENTS = Documents(
    sequences=tuple(TokenSequence(ids=(0,) * (1 + scored)) for scored in (2, 3, 1)),
    bounds=np.array([0, 2, 5, 6]),
    validation=1,
)
HALF, TENTH = np.log(0.5), np.log(0.1)


def _scores() -> RunScores:
    """Expert 0 knows the first two documents, expert 1 the last."""
    experts = np.array([[HALF] * 5 + [TENTH], [TENTH] * 5 + [HALF]], dtype=np.float32)
    return RunScores(experts=experts, seed=np.full(6, np.log(0.25), dtype=np.float32), mean=None)


def test_perplexity_is_of_each_split_alone() -> None:
    found = mixing.perplexity(_scores().experts[0], DOCUMENTS)
    assert found.validation == pytest.approx(2)
    assert found.test == pytest.approx((2**3 * 10) ** (1 / 4))


def test_an_oracle_takes_the_likeliest_expert_of_each_document() -> None:
    assert mixing.oracle(_scores(), DOCUMENTS).test == pytest.approx(2)


def test_policies_look_at_the_context_that_they_weigh_and_at_no_later_one() -> None:
    documents = Documents(
        sequences=(TokenSequence(ids=(0,) * 41), TokenSequence(ids=(0,) * 4)),
        bounds=np.array([0, 40, 43]),
        validation=1,
    )
    # The weights of a token name the length of the context before it.
    lengths = np.array([*range(1, 41), *range(1, 4)], dtype=float)[:, None]
    each = {name: mixing.followed(lengths, documents, options)[:, 0] for name, options in mixing.POLICIES.items()}
    assert (each["each token"] == lengths[:, 0]).all()
    assert (each["once after 16"] == np.minimum(lengths[:, 0], 16)).all()
    assert each["each 16"].tolist() == [*range(1, 16), *[16] * 16, *[32] * 9, 1, 2, 3]
    for values in each.values():
        assert (values <= lengths[:, 0]).all()


def test_of_the_temperatures_validation_chooses_and_test_is_reported() -> None:
    right, wrong = np.tile([1.0, 0.0], (6, 1)), np.tile([0.0, 1.0], (6, 1))
    found = mixing.mixtures(_scores(), {0.5: wrong, 2.0: right}, DOCUMENTS, ks=[1, 0])
    assert {(m.policy, m.k) for m in found} == {(policy, k) for policy in mixing.POLICIES for k in (1, 0)}
    for mixture in found:
        assert mixture.temperature == 2.0
        # On test the other temperature would have been no worse in the last document.
        assert mixture.perplexity == mixing.perplexity(_scores().experts[0], DOCUMENTS)


def test_probabilities_are_mixed_and_not_their_logarithms() -> None:
    (mixture, *_) = mixing.mixtures(_scores(), {1.0: np.full((6, 2), 0.5)}, DOCUMENTS, ks=[0])
    assert mixture.perplexity.test == pytest.approx(1 / 0.3)


def test_the_seed_stands_in_where_no_expert_is_sure() -> None:
    weights = np.tile([0.1, 0.9], (6, 1))
    weights[:2] = [0.45, 0.55]
    for threshold, at in mixing.with_seed(_scores(), weights, DOCUMENTS).values():
        # On the first document the unsure choice is the wrong expert: 0.1 against the seed's 0.25.
        assert threshold == 0.6
        assert at.validation == pytest.approx(4)
        assert at.test == pytest.approx((10**3 * 2) ** (1 / 4))


def test_spread_is_of_documents() -> None:
    dense = np.array([2, 3, 1]) * np.log(0.4)
    assert mixing.spread(np.array([2, 3, 1]) * HALF, dense, DOCUMENTS) == pytest.approx((0.2, 0.2))


@pytest.mark.parametrize("clusters", [4, 8, 16])
@pytest.mark.parametrize("fraction", [0.5, 0.75])
def test_every_contender_sees_as_many_training_tokens(clusters: int, fraction: float) -> None:
    size = SIZES["small"]
    made = recipe(
        size,
        seed=0,
        clusters=clusters,
        fraction=fraction,
        seed_phase=Phase(batch=8, learning_rate=2e-3),
        experts=Phase(batch=2, learning_rate=1e-3),
    )
    assert made.budget_tokens(clusters, from_scratch=True) == pytest.approx(size.tokens, rel=0.01)


def test_a_recipe_is_written_as_it_is_read(tmp_path: Path) -> None:
    phase = Phase(batch=4, learning_rate=3e-3)
    made = recipe(SIZES["124m"], seed=1, clusters=4, fraction=0.75, seed_phase=phase, experts=phase)
    (tmp_path / "recipe.toml").write_text(toml(made))
    assert Recipe.from_toml(tmp_path / "recipe.toml") == made


def test_the_default_cut_says_what_it_will_train() -> None:
    # Three dense batches and two rates more, protocol A's seed, K = 4, 8, 16 and random; protocol B's seed of 75 %,
    # K = 16 at two rates, K = 4 and 8; its seed of 50 %, K = 16 at two rates. A best at the sweep's edge adds one more.
    honest = 0.75 + 4 * 0.25 + 0.5 + 2 * 0.5
    assert Plan(size=SIZES["small"], seeds=(0,), full=False).units() == 5 + 0.5 + 3 * 0.5 + 0.5 + honest


def test_a_corpus_is_cut_alike_in_every_domain_and_parted_at_random(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for domain in ("a", "b"):
        lines = [json.dumps({"text": f"{domain} {n:03}", "domain": domain}) for n in range(100)]
        (source / f"{domain}.jsonl").write_text("\n".join(lines) + "\n")
    corpus = cut(source, tmp_path / "cut", domain_bytes=250)
    documents = [json.loads(line) for line in corpus.read_text().splitlines()]
    assert [d["id"][0] for d in documents] == ["a"] * 50 + ["b"] * 50
    assert all(set(d) == {"id", "text"} for d in documents)
    assert {d["text"][2:] for d in documents[:50]} != {f"{n:03}" for n in range(50)}
    split = [
        [json.loads(line)["id"] for line in path.read_text().splitlines()] for path in parts(corpus, tmp_path, count=4)
    ]
    assert sorted(i for part in split for i in part) == sorted(d["id"] for d in documents)
    assert min(len(part) for part in split) > 10


def test_ids_are_one_piece_each() -> None:
    from cbtm_common.routing.learned import pieces

    assert [(start, end) for start, end, _ in pieces(written([0, 5, 0, 19_999]))] == [(n, n + 1) for n in range(4)]
    with pytest.raises(ValueError, match="20000"):
        written([20_000])


def test_tables_name_the_gain_with_its_interval() -> None:
    row = Row(
        seed=0,
        protocol="B",
        clusters=2,
        seed_fraction=0.75,
        random=False,
        router="learned",
        policy="each token",
        k=1,
        temperature=1.0,
        validation=20.0,
        test=18.0,
        dense=20.0,
        gain=0.1,
        gain_low=0.08,
        gain_high=0.12,
    )
    about = {
        "size": "small",
        "parameters": 1,
        "tokens": 1,
        "sequence_length": 1,
        "seeds": [0],
        "paper_batch": 32,
        "date": "today",
        "machine": "a machine",
        "duration": "a while",
    }
    assert "18.00 (-10.0 % [-12.0, -8.0])" in markdown(Findings(rows=[row]), about, ["command"])
