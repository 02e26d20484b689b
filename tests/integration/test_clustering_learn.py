"""The learned router trained on real text: short contexts are routed better, weights are calibrated, and it repeats."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from cbtm_common.errors import InvalidArgument
from cbtm_common.routing import CentroidRouter
from cbtm_common.routing.learned import pieces
from cbtm_coordinator.clustering.fit import fit
from cbtm_coordinator.clustering.learn import LearnResult, learn_router
from tests.integration.test_clustering_fit import KINDS, read

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def clustering() -> CentroidRouter:
    return fit(training_texts(), [f"r-c{i:04d}" for i in range(4)], seed=0).router


@pytest.fixture(scope="module")
def learned(clustering: CentroidRouter) -> LearnResult:
    return learn_router(clustering, training_texts(), seed=0)


def training_texts() -> list[str]:
    return [text for name in KINDS for text in read(name, 200)]


def unseen(count: int) -> list[str]:
    return [text for name in KINDS for text in read(name, count, skip=200)]


def beginning(text: str, count: int) -> str:
    return text[: [end for _, end, _ in islice(pieces(text), count)][-1]]


def test_short_contexts_go_to_their_documents_cluster_more_often(
    clustering: CentroidRouter, learned: LearnResult
) -> None:
    texts = unseen(100)
    target = np.tile(clustering.assign(texts), 3)
    losses, right = {}, {}
    for kind, router in (("centroid", clustering), ("learned", learned.router)):
        weights = router.weights([beginning(text, count) for count in (3, 6, 12) for text in texts])
        right[kind] = (weights.argmax(axis=1) == target).mean()
        losses[kind] = -np.log(weights[np.arange(len(target)), target]).mean()
    assert right["learned"] > right["centroid"], right
    assert losses["learned"] < 0.9 * losses["centroid"], losses


def test_its_weights_are_as_sure_as_they_are_right(learned: LearnResult) -> None:
    texts = unseen(60)
    target = learned.router.assign(texts)
    weights = learned.router.weights([beginning(text, 16) for text in texts])
    assert abs(weights.max(axis=1).mean() - (weights.argmax(axis=1) == target).mean()) < 0.1


def test_what_it_says_of_itself_is_so_and_it_repeats(clustering: CentroidRouter, learned: LearnResult) -> None:
    assert 0.5 < learned.accuracy <= 1
    assert learned.accuracy > learned.centroid_accuracy
    assert learned.report()["pieces"] == len(learned.router.vocabulary) > 500
    again = learn_router(clustering, training_texts(), seed=0)
    np.testing.assert_array_equal(again.router.coefficients, learned.router.coefficients)
    assert again.router.temperature == learned.router.temperature


def test_documents_go_on_to_be_sharded_by_the_clustering(clustering: CentroidRouter, learned: LearnResult) -> None:
    np.testing.assert_array_equal(learned.router.assign(unseen(20)), clustering.assign(unseen(20)))


def test_too_few_texts_are_refused(clustering: CentroidRouter) -> None:
    with pytest.raises(InvalidArgument, match=r"routing\.router: 2 documents are too few"):
        learn_router(clustering, ["one word", "two words"], seed=0)
