"""tf-idf of a sample: the weights, which terms are kept, and what is forgotten when there are too many."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cbtm_coordinator.clustering import tfidf as module
from cbtm_coordinator.clustering.engine import ONE_PROCESS
from cbtm_coordinator.clustering.tfidf import tfidf


def test_weights_are_counts_times_idf_in_rows_of_length_one() -> None:
    texts = ["Apple apple pear a 12", "pear plum", "plum PLUM plum", ""]
    found = tfidf(texts, min_documents=1)
    assert found.terms == ("apple", "pear", "plum")
    # Of 4 texts, apple is in one, pear in two, plum in two.
    idf = np.log(5 / np.array([2.0, 3.0, 3.0])) + 1
    np.testing.assert_allclose(found.idf, idf)
    expected = np.array([[2, 1, 0], [0, 1, 1], [0, 0, 3], [0, 0, 0]]) * idf
    expected[:3] /= np.linalg.norm(expected[:3], axis=1, keepdims=True)
    np.testing.assert_allclose(found.matrix.toarray(), expected, atol=1e-6)


def test_rare_terms_are_left_out_and_of_the_others_the_most_frequent_are_kept() -> None:
    texts = ["aa aa aa bb", "aa bb cc", "cc once"]
    assert tfidf(texts, min_documents=2).terms == ("aa", "bb", "cc")
    assert tfidf(texts, min_documents=1, max_terms=2).terms == ("aa", "bb")


@pytest.mark.parametrize("texts", [[""], ["a 12 b"], ["once"]])
def test_texts_without_usable_words_give_no_terms(texts: list[str]) -> None:
    assert tfidf(texts, min_documents=2).matrix.shape == (len(texts), 0)


def test_a_vocabulary_without_end_is_cut_to_what_is_frequent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_COUNTED", 50)
    monkeypatch.setattr(module, "_PIECE_TEXTS", 10)
    texts = [f"common word noise{i}a noise{i}b" for i in range(200)]
    counted = module._count(texts, ONE_PROCESS, lambda _: None)
    assert len(counted.ids) <= 50
    assert tfidf(texts, min_documents=2).terms == ("common", "word")
    assert math.isclose(tfidf(texts, min_documents=2).idf[0], 1.0)


def test_pieces_of_the_sample_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"ship Ship sea{i % 7} mast{i % 3} wreck" if i % 5 else "" for i in range(60)]
    whole = tfidf(texts, min_documents=2)
    monkeypatch.setattr(module, "_PIECE_TEXTS", 7)
    told: list[int] = []
    cut = tfidf(texts, min_documents=2, on_texts=told.append)
    assert cut.terms == whole.terms
    np.testing.assert_array_equal(cut.matrix.toarray(), whole.matrix.toarray())
    assert sum(told) == 60
