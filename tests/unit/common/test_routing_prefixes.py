"""Routing of every prefix of a text in one pass, and of a text that grows, against routing each text by itself."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cbtm_common.routing import CentroidRouter, Distance, TermEmbedding, terms
from cbtm_common.routing.terms import term_of, written_words

# Words that are terms, and forms of them: a prefix may cut one word into another that is known as well.
_TERMS = ["ship", "ships", "shipwreck", "sea", "élan", "straße", "naïve", "x2", "日本語", "_name", "don", "fn"]


def make_router(clusters: int = 4, dimensions: int = 5, seed: int = 0, *, sublinear: bool = False) -> CentroidRouter:
    random = np.random.default_rng(seed)
    prior = random.random(clusters).astype(np.float32)
    return CentroidRouter(
        cluster_ids=[f"run-c{i:04d}" for i in range(clusters)],
        embedding=TermEmbedding(
            _TERMS, random.normal(size=(len(_TERMS), dimensions)).astype(np.float32), sublinear=sublinear
        ),
        centroids=random.normal(size=(clusters, dimensions)).astype(np.float32),
        prior=prior / prior.sum(),
        temperature=0.7,
    )


ROUTER = make_router()
ROUTERS = [ROUTER, make_router(sublinear=True)]
both = pytest.mark.parametrize("router", ROUTERS, ids=["linear", "sublinear"])

_pieces = st.one_of(
    st.sampled_from([*_TERMS, *(t.upper() for t in _TERMS)]),
    # Unknown words, single letters, words that begin with a digit, apostrophes, letters that lower-case to two.
    st.sampled_from(["the", "The", "a", "I", "2x", "1984", "don't", "l'été", "İstanbul", "ß", "_", "__", "e\u0301lan"]),
    st.sampled_from([" ", "  ", "\n", "-", ".", ",", "'", "\u00a0", "\u200b", "\t", "’", "😀"]),
    st.text(max_size=3),
)
texts = st.lists(_pieces, max_size=14).map("".join)


@both
@given(text=texts)
@example(text="")
@example(text="The ships of the sea; a shipwreck, x2 2x élan")
@example(text="ship Ship ships SHIP sea ships shi ship")
@example(text="shipwreck" * 3)
@settings(max_examples=60, deadline=None)
def test_every_prefix_weighs_as_it_does_alone(router: CentroidRouter, text: str) -> None:
    ends = list(range(len(text) + 1))
    together = router.prefix_weights(text, ends)
    alone = router.weights([text[:end] for end in ends])
    np.testing.assert_allclose(together, alone, atol=1e-6)


@both
@given(text=texts, cuts=st.lists(st.integers(0, 60), max_size=6))
@settings(max_examples=30, deadline=None)
def test_a_text_that_grows_in_pieces_weighs_as_the_whole(router: CentroidRouter, text: str, cuts: list[int]) -> None:
    places = sorted({0, len(text), *(min(cut, len(text)) for cut in cuts)})
    running = router.begin()
    for start, end in pairwise(places):
        running = running.extend(text[start:end])
    np.testing.assert_allclose(router.running_weights([running]), router.weights([text]), atol=1e-6)


@both
def test_a_text_that_branches_leaves_the_other_branch_as_it_was(router: CentroidRouter) -> None:
    stem = router.begin().extend("ship sea ship")
    wreck, plain = stem.extend("wreck at sea, ship"), stem.extend(" at sea ships")
    last = wreck.extend(" sea ship")
    together = router.running_weights([stem, wreck, plain, last])
    whole = ["ship sea ship", "ship sea shipwreck at sea, ship", "ship sea ship at sea ships"]
    alone = router.weights([*whole, f"{whole[1]} sea ship"])
    np.testing.assert_allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize("distance", list(Distance))
@pytest.mark.parametrize("top_k", [None, 1, 2, 9])
def test_prefixes_take_the_same_options_as_whole_texts(distance: Distance, top_k: int | None) -> None:
    text = "a ship, the sea and x2 more ships"
    ends = [0, 3, 6, 6, 14, len(text)]
    options = {"top_k": top_k, "temperature": 0.3, "distance": distance}
    together = ROUTER.prefix_weights(text, ends, **options)  # type: ignore[arg-type]
    alone = ROUTER.weights([text[:end] for end in ends], **options)  # type: ignore[arg-type]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert ((together > 0).sum(axis=1) <= (top_k or 4)).all()
    np.testing.assert_allclose(together.sum(axis=1), 1.0)


def test_no_prefixes_give_no_rows() -> None:
    assert ROUTER.prefix_weights("a ship", []).shape == (0, 4)


def test_prefixes_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="descend"):
        ROUTER.prefix_weights("a ship at sea", [4, 2])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The ship, a SHIP, 1984 ships", ["the", "ship", "ship", "ships"]),
        ("I, x 7", []),
        ("don't", ["don"]),
        ("ein naïves Élan", ["ein", "naïves", "élan"]),
        ("fn new_name(x2: i32)", ["fn", "new_name", "x2", "i32"]),
        ("", []),
    ],
)
def test_terms_of_a_text(text: str, expected: list[str]) -> None:
    assert terms(text) == expected


def test_a_term_that_is_repeated_weighs_one_and_the_logarithm_of_its_count() -> None:
    embedding = TermEmbedding(["ship", "sea"], np.eye(2, dtype=np.float32), sublinear=True)
    expected = np.array([1 + np.log(3), 1.0])
    np.testing.assert_allclose(embedding.embed(["Ship sea, the SHIP ship"])[0], expected / np.linalg.norm(expected))


@given(text=texts)
@example(text="a_b A1 1a \x1c\x0bx yy\ttab")
@example(text="ΟΔΟΣ'Α ΣΑΣ İstanbul ǅ \ud800x")
def test_words_are_read_alike_whether_ascii_or_not(text: str) -> None:
    def read(text: str) -> list[str]:
        found = (term_of(word.decode("utf-8", "surrogatepass")) for word in written_words(text))
        return [term for term in found if term is not None]

    assert read(text) == terms(text)
    # A sign that is no word, and no ASCII.
    assert read(text + " ☃") == terms(text)


def test_whole_texts_and_words_are_lower_cased_alike() -> None:
    # But for the two letters that are read word by word.
    every = [chr(code) for code in range(sys.maxunicode + 1) if chr(code) not in "Σİ"]
    words = [f"a{letter}b" for letter in every]
    assert "".join(word.lower() for word in words) == "".join(words).lower()
    assert [len(terms(word)) for word in words] == [len(terms(word.lower())) for word in words]
