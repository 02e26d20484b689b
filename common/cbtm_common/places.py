"""Places in a tensor at which its values are told: by a replay of what it trained to, by the coordinator of what was
committed. They are no secret; who has not trained does not know the values.
"""

from __future__ import annotations

_PLACES = 16


def places(count: int) -> list[int]:
    """Of a tensor of `count` values, flattened: sixteen, evenly spaced from the first on; all where there are fewer."""
    told = min(count, _PLACES)
    return [number * count // told for number in range(told)]
