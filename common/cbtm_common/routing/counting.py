"""How often each word occurs in each of many texts, as one sort of numbers.

Words that a caller knows have numbers of its own; a text's words are looked up one after the other, and what is looked
up is counted for all texts at once. Per word that is a look-up in a hash table and a place in a sort, in C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cbtm_common.routing.terms import written_words

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class WordCounts:
    """Of text i: `numbers[starts[i]:starts[i + 1]]`, ascending, each `counts` times."""

    numbers: Int64
    counts: Int64
    starts: Int64


def count_words(texts: Sequence[str], number_of: Callable[[bytes], int]) -> WordCounts:
    """`number_of` gives the number of a word as `written_words` has it, or -1 for one that does not count."""
    looked_up: list[int] = []
    lengths: list[int] = []
    for text in texts:
        words = written_words(text)
        lengths.append(len(words))
        looked_up += map(number_of, words)
    numbers = np.array(looked_up, dtype=np.int64)
    text_of = np.repeat(np.arange(len(texts)), lengths)
    known = numbers >= 0
    width = int(numbers.max(initial=0)) + 1
    keys = text_of[known] * width + numbers[known]
    keys.sort()
    firsts = np.flatnonzero(np.diff(keys, prepend=-1))
    text_of, numbers = np.divmod(keys[firsts], width)
    return WordCounts(
        numbers=numbers,
        counts=np.diff(firsts, append=len(keys)),
        starts=np.searchsorted(text_of, np.arange(len(texts) + 1)),
    )
