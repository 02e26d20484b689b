"""Held-out documents, and which of them serve for what: choices are made on validation, numbers reported on test."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from cbtm_common.errors import InvalidArgument

HeldOutSplit = Literal["test", "validation"]
_SPLITS: tuple[HeldOutSplit, ...] = get_args(HeldOutSplit)


@dataclass(frozen=True, kw_only=True)
class HeldOutDocument:
    """A document that no expert trained on: its token ids (without end-of-text), and the cluster it belongs to."""

    token_ids: tuple[int, ...]
    cluster_id: str


def in_split(documents: Iterable[HeldOutDocument], split: HeldOutSplit) -> Iterator[HeldOutDocument]:
    """Of each cluster's documents in turn, the first to test, the next to validation, and so on.

    A document's place among its cluster's held-out ones alone decides, so a run's two splits never meet.
    Raises InvalidArgument for another split.
    """
    if split not in _SPLITS:
        raise InvalidArgument(f"split: {split!r} is not one of {', '.join(_SPLITS)}", field="split")
    seen: dict[str, int] = {}
    for document in documents:
        place = seen.get(document.cluster_id, 0)
        seen[document.cluster_id] = place + 1
        if _SPLITS[place % len(_SPLITS)] == split:
            yield document
