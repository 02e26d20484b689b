"""Pages and their tokens."""

from __future__ import annotations

import pytest

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.errors import InvalidArgument
from cbtm_coordinator.services import paging


def test_a_token_brings_back_its_key() -> None:
    for key in ("run_1", 7, [3, "TRAIN", 5]):
        assert paging.decode(paging.encode(key), type(key)()) == key


def test_no_token_is_the_first_page() -> None:
    assert paging.decode("", -1) == -1


@pytest.mark.parametrize("token", ["x", "%%%", "bm90IGpzb24=", "é"])
def test_a_token_that_is_not_ours_is_refused(token: str) -> None:
    with pytest.raises(InvalidArgument, match="page_token"):
        paging.decode(token, "")


def test_a_token_of_another_listing_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="page_token"):
        paging.decode(paging.encode(7), "")


def test_a_page_has_a_default_and_a_greatest_size() -> None:
    assert paging.page_size(0) == paging.DEFAULT_PAGE
    assert paging.page_size(10**6) == paging.MAX_PAGE
    with pytest.raises(InvalidArgument, match="page_size"):
        paging.page_size(-1)


def test_a_page_of_large_messages_is_cut_and_never_empty() -> None:
    clusters = [pb.Cluster(id="x" * 100) for _ in range(10)]
    one = clusters[0].ByteSize()
    assert paging.fitting(clusters) == clusters
    assert len(paging.fitting(clusters, limit=3 * one)) == 3
    assert len(paging.fitting(clusters, limit=1)) == 1
    assert paging.fitting([]) == []
