"""Which held-out documents choices are made on, and which are reported."""

from __future__ import annotations

import random

import pytest

from cbtm._held_out import HeldOutDocument, in_split
from cbtm_common.errors import InvalidArgument


def test_splits_are_disjoint_complete_and_halves_of_each_cluster() -> None:
    documents = [HeldOutDocument(token_ids=(i,), cluster_id=f"c{i % 3 if i < 20 else 0}") for i in range(31)]
    random.Random(0).shuffle(documents)
    test, validation = list(in_split(documents, "test")), list(in_split(documents, "validation"))
    assert {d.token_ids for d in test} | {d.token_ids for d in validation} == {(i,) for i in range(31)}
    assert len(test) + len(validation) == 31
    for cluster in ("c0", "c1", "c2"):
        assert sum(d.cluster_id == cluster for d in test) - sum(d.cluster_id == cluster for d in validation) in (0, 1)


def test_a_cluster_added_or_left_out_moves_no_document_of_another() -> None:
    documents = [HeldOutDocument(token_ids=(i,), cluster_id=f"c{i % 2}") for i in range(10)]
    alone = [d for d in documents if d.cluster_id == "c1"]
    assert list(in_split(alone, "validation")) == [d for d in in_split(documents, "validation") if d in alone]


def test_a_split_of_another_name_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="'train' is not one of test, validation"):
        list(in_split([], "train"))  # type: ignore[arg-type]
