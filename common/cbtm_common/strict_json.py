"""JSON from strangers: one meaning or none.

Python's reader takes the last of two equal names, and NaN and Infinity, which are no JSON. What nests too deep or
writes a number of thousands of digits is refused too, as an error of the same class. The caller bounds the length.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn


def loads(text: bytes | str) -> Any:
    """The value of `text`, UTF-8 when it is bytes. Raises ValueError, saying what is wrong."""
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("it nests too deep") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
