"""What a kind of router gets for the little it says, with one that is nothing like the centroid router."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cbtm_common.routing import CentroidRouter, load_router, register_router
from tests.support.routers import LinearRouter

ROUTER = LinearRouter.random(["c0", "c1", "c2"])
TEXT = "a ship at sea"


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_whole_texts_prefixes_and_growing_texts_weigh_alike(top_k: int | None) -> None:
    ends = [0, 1, 1, 5, len(TEXT)]
    alone = ROUTER.weights([TEXT[:end] for end in ends], top_k=top_k, temperature=0.5)
    np.testing.assert_allclose(ROUTER.prefix_weights(TEXT, ends, top_k=top_k, temperature=0.5), alone)
    grown = ROUTER.running_weights([ROUTER.begin().extend(TEXT[:5]).extend(TEXT[5:])], top_k=top_k, temperature=0.5)
    np.testing.assert_allclose(grown[0], alone[-1])
    with pytest.raises(ValueError, match="descend"):
        ROUTER.prefix_weights(TEXT, [4, 2])


def test_documents_are_assigned_to_the_heaviest_cluster() -> None:
    texts = [TEXT, "zebra", "quiz"]
    np.testing.assert_array_equal(ROUTER.assign(texts), ROUTER.weights(texts).argmax(axis=1))


def test_a_saved_router_is_read_by_the_class_of_its_kind(tmp_path: Path) -> None:
    ROUTER.save(tmp_path)
    again = load_router(tmp_path)
    assert isinstance(again, LinearRouter)
    np.testing.assert_allclose(again.weights([TEXT]), ROUTER.weights([TEXT]))


def test_one_name_is_one_kind() -> None:
    with pytest.raises(ValueError, match="two kinds of router are named 'centroid'"):

        @register_router
        class Other(LinearRouter):
            kind = CentroidRouter.kind
