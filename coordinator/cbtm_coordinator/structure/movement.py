"""How weights moved in a segment, at the places that are told of each tensor (`cbtm_common.places`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np

from cbtm_coordinator.structure.architecture import Sizes, floats_from_text, floats_to_text

Movement = tuple[float, ...]


def floats(told: bytes) -> list[float]:
    """Of float32, little-endian; what is no whole number of them tells nothing."""
    return [] if len(told) % 4 else np.frombuffer(told, "<f4").astype(float).tolist()


def moved(names: Sequence[str], begin: Sizes, end: Mapping[str, Sequence[float]]) -> Movement:
    """`end` - `begin` of each named tensor. Nothing when `end` lacks one of them, or tells other places of it."""
    found: list[float] = []
    for name in names:
        before, after = begin[name].sampled, end.get(name, ())
        if len(before) != len(after):
            return ()
        found += [float(b) - float(a) for a, b in zip(before, after, strict=True)]
    return tuple(found)


def moved_to_json(*, replayed: Movement | None, committed: Movement) -> str:
    """`replayed` None: the auditor told none, as an older version does."""
    told = None if replayed is None else floats_to_text(replayed)
    return json.dumps({"replayed": told, "committed": floats_to_text(committed)})


def moved_from_json(text: str) -> tuple[Movement | None, Movement | None]:
    """(replayed, committed); None for what is not known."""
    if not text:
        return None, None
    said = json.loads(text)
    replayed = said["replayed"]
    return None if replayed is None else floats_from_text(replayed), floats_from_text(said["committed"])
