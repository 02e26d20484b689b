"""The learned router: every way to the weights of a text gives the same ones, and what is saved is what was."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cbtm_common.errors import IntegrityError, InvalidArgument
from cbtm_common.routing import CentroidRouter, Distance, LearnedRouter, TermEmbedding, load_router
from cbtm_common.routing.learned import pieces

_WORDS = ["ship", "ships", "shipwreck", "sea", "the", "a", "0", ",", "(", "語", "日", "_name", "élan"]


def make_router(clusters: int = 4) -> LearnedRouter:
    random = np.random.default_rng(3)
    prior = random.random(clusters).astype(np.float32)
    clustering = CentroidRouter(
        cluster_ids=[f"run-c{i:04d}" for i in range(clusters)],
        embedding=TermEmbedding(["ship", "sea"], random.normal(size=(2, 3)).astype(np.float32)),
        centroids=random.normal(size=(clusters, 3)).astype(np.float32),
        prior=prior / prior.sum(),
    )
    return LearnedRouter(
        clustering=clustering,
        vocabulary=_WORDS,
        coefficients=random.normal(size=(len(_WORDS), clusters)).astype(np.float32),
        bias=random.normal(size=clusters).astype(np.float32),
        temperature=1.3,
    )


ROUTER = make_router()
_bits = st.one_of(
    st.sampled_from(_WORDS),
    st.sampled_from(["The", "SHIP", "19", "7up", "x", "日本語", "กข", "İstanbul", "e\u0301lan", "unknown"]),
    st.sampled_from([" ", "\n", "-", "😀", "\u200b", "'"]),
    st.text(max_size=3),
)
texts = st.lists(_bits, max_size=14).map("".join)


def logits_by_definition(text: str) -> np.ndarray:
    found = [piece for _, _, piece in pieces(text)]
    total = ROUTER.bias.astype(np.float64)
    for row, piece in enumerate(_WORDS):
        total = total + np.log1p(found.count(piece)) * ROUTER.coefficients[row]
    return total


@given(text=texts)
@example(text="ships, ship (the sea) 日本語 1984 ship")
@settings(max_examples=60, deadline=None)
def test_weights_are_the_softmax_of_log_counts(text: str) -> None:
    if any(piece in _WORDS for _, _, piece in pieces(text)):
        logits = logits_by_definition(text) / ROUTER.temperature
        expected = np.exp(logits - logits.max())
        expected /= expected.sum()
    else:
        expected = ROUTER.clustering.prior
    np.testing.assert_allclose(ROUTER.weights([text])[0], expected, atol=1e-6)


@given(text=texts, cuts=st.lists(st.integers(0, 60), max_size=6))
@example(text="shipwreck" * 3, cuts=[4, 5])
@settings(max_examples=80, deadline=None)
def test_prefixes_and_growing_texts_weigh_as_they_do_alone(text: str, cuts: list[int]) -> None:
    ends = list(range(len(text) + 1))
    alone = ROUTER.weights([text[:end] for end in ends])
    np.testing.assert_allclose(ROUTER.prefix_weights(text, ends), alone, atol=1e-9)
    running = ROUTER.begin()
    for start, end in pairwise(sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})):
        running = running.extend(text[start:end])
    np.testing.assert_allclose(ROUTER.running_weights([running])[0], alone[-1], atol=1e-9)


def test_branches_do_not_disturb_each_other() -> None:
    stem = ROUTER.begin().extend("the ship and the ")
    first = stem.extend("sea, ")
    second = stem.extend("ship ship ")
    first = first.extend("sea")
    third = stem.extend("ship")
    found = ROUTER.running_weights([stem, first, second, third])
    stems = "the ship and the "
    expected = ROUTER.weights([stems, stems + "sea, sea", stems + "ship ship ", stems + "ship"])
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_documents_are_sharded_by_the_clustering() -> None:
    documents = ["ship ship", "sea", "the"]
    np.testing.assert_array_equal(ROUTER.assign(documents), ROUTER.clustering.assign(documents))


def test_restricted_to_some_clusters_it_is_the_softmax_over_those(tmp_path: Path) -> None:
    ids = [ROUTER.cluster_ids[2], ROUTER.cluster_ids[0]]
    whole = ROUTER.weights(["the ship", ""])[:, [2, 0]]
    some = ROUTER.restrict(ids)
    some.save(tmp_path)
    np.testing.assert_array_equal(load_router(tmp_path).weights(["a sea"]), some.weights(["a sea"]))
    np.testing.assert_allclose(some.weights(["the ship", ""]), whole / whole.sum(axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(InvalidArgument, match="knows no cluster other"):
        ROUTER.restrict(["other"])


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    ROUTER.save(tmp_path)
    again = load_router(tmp_path)
    assert isinstance(again, LearnedRouter)
    assert not [path for path in tmp_path.rglob("*") if path.suffix not in (".json", ".safetensors", "")]
    documents = ["the ship, 日本語", "", "sea"]
    np.testing.assert_array_equal(again.weights(documents, top_k=2), ROUTER.weights(documents, top_k=2))
    np.testing.assert_array_equal(again.assign(documents), ROUTER.assign(documents))
    assert again.temperature == ROUTER.temperature


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocabulary": ["ship"] * len(_WORDS)}, "twice"),
        ({"vocabulary": "ship"}, "not a list"),
        ({"vocabulary": ["ship"]}, "do not fit together"),
        ({"temperature": 0}, "not above 0"),
        ({"cluster_ids": ["a", "b", "c", "d"]}, "the clustering in it"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    ROUTER.save(tmp_path)
    about = json.loads((tmp_path / "router.json").read_text())
    (tmp_path / "router.json").write_text(json.dumps({**about, **change}))
    with pytest.raises(IntegrityError, match=words):
        load_router(tmp_path)


def test_it_has_no_distance() -> None:
    with pytest.raises(InvalidArgument, match="distance"):
        ROUTER.weights(["ship"], distance=Distance.QUARTIC)
