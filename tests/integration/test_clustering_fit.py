"""The clustering model fitted on real text: what it finds, and that what was fitted is exactly what routes."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cbtm_common.errors import InvalidArgument
from cbtm_common.routing import load_router, terms
from cbtm_coordinator.clustering.fit import FitResult, fit
from cbtm_coordinator.clustering.tfidf import tfidf

pytestmark = pytest.mark.integration

CORPUS = Path(__file__).parents[2] / "examples" / "corpus"
KINDS = ("literature", "code_rust", "speeches", "formal_math")


def read(name: str, count: int, skip: int = 0) -> list[str]:
    with gzip.open(CORPUS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"][200:1700] for _, line in zip(range(skip + count), lines, strict=False)][skip:]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text for name in KINDS for text in read(name, 120)]


@pytest.fixture(scope="module")
def fitted(texts: list[str]) -> FitResult:
    return fit(texts, [f"r-c{i:04d}" for i in range(4)], seed=0, temperature=0.1)


def test_documents_of_a_kind_fall_into_one_cluster_also_those_never_seen(fitted: FitResult) -> None:
    homes = []
    for name in KINDS:
        clusters = fitted.router.assign(read(name, 60, skip=200))
        counts = np.bincount(clusters, minlength=4)
        assert counts.max() >= 48, (name, counts)
        homes.append(int(counts.argmax()))
    assert sorted(homes) == [0, 1, 2, 3]


def test_the_sample_is_shared_out_evenly(texts: list[str], fitted: FitResult) -> None:
    counts = np.bincount(fitted.router.assign(texts), minlength=4)
    assert counts.min() > 0.7 * len(texts) / 4
    assert fitted.router.prior.sum() == pytest.approx(1, abs=1e-5)
    assert (fitted.router.prior > 0.1).all()


def test_top_terms_are_those_of_the_cluster(fitted: FitResult) -> None:
    (code,) = set(fitted.router.assign(read("code_rust", 5, skip=200)).tolist())
    assert {"fn", "self"} <= set(fitted.top_terms[code])
    assert all(1 <= len(found) <= 20 for found in fitted.top_terms)


def test_centroids_are_within_the_unit_ball_and_the_rest_is_said(fitted: FitResult) -> None:
    assert fitted.router.centroids.shape == (4, 100)
    assert (np.linalg.norm(fitted.router.centroids, axis=1) <= 1 + 1e-5).all()
    assert 0 < fitted.explained_variance <= 1
    assert fitted.inertia > 0


def test_a_seed_gives_the_same_router_and_it_survives_being_saved(
    texts: list[str], fitted: FitResult, tmp_path: Path
) -> None:
    again = fit(texts, [f"r-c{i:04d}" for i in range(4)], seed=0, temperature=0.1)
    np.testing.assert_array_equal(fitted.router.centroids, again.router.centroids)
    np.testing.assert_array_equal(fitted.router.prior, again.router.prior)
    fitted.router.save(tmp_path)
    np.testing.assert_array_equal(load_router(tmp_path).assign(texts), fitted.router.assign(texts))


@pytest.mark.parametrize("sublinear", [False, True])
def test_tf_idf_is_that_of_scikit_learn(texts: list[str], sublinear: bool) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    theirs = TfidfVectorizer(analyzer=terms, min_df=2, sublinear_tf=sublinear)
    expected = theirs.fit_transform(texts)
    ours = tfidf(texts, min_documents=2, sublinear=sublinear)
    assert ours.terms == tuple(theirs.get_feature_names_out())
    np.testing.assert_allclose(ours.idf, theirs.idf_, rtol=1e-6)
    np.testing.assert_allclose(ours.matrix.toarray(), expected.toarray(), atol=1e-5)


def test_of_too_many_terms_the_most_frequent_are_kept(texts: list[str]) -> None:
    few = tfidf(texts, min_documents=2, max_terms=100)
    counts = Counter(term for text in texts for term in terms(text))
    assert len(few.terms) == 100
    assert min(counts[term] for term in few.terms) >= sorted(counts.values())[-101]


def test_one_cluster_needs_no_fitting() -> None:
    result = fit(["anything", ""], ["only"], seed=0, temperature=0.1)
    np.testing.assert_array_equal(result.router.weights(["whatever", ""]), [[1.0], [1.0]])


@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_few_short_documents_can_be_clustered(count: int) -> None:
    words = "ship sea wreck sail mast function loop pointer struct trait".split()
    texts = [" ".join(words[i % 10 : i % 10 + 3]) + f" extra{i}" for i in range(count)]
    result = fit(texts, ["a", "b"], seed=0, temperature=0.1)
    assert sorted(np.bincount(result.router.assign(texts), minlength=2)) >= [0, 1]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["only one"], "2 cannot be made of 1 documents"),
        (["a b", "c 77", "1 2 3"], "too few different words"),
        (["same", "same", "same"], "too few different words"),
        (["ship sea", "x y", "1 2", "a"], "1 document.* have words to cluster by"),
    ],
)
def test_texts_that_cannot_be_clustered_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        fit(texts, ["a", "b"], seed=0, temperature=0.1)
