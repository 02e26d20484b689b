"""How often each term has occurred in a text that grows: what weights that are not linear in counts need to know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


class History:
    """Rows of one text's terms in order, shared by all its states; it grows in place with the longest of them.

    A state knows how many of the rows are its own. To go on from one that another has gone on from costs a copy.
    """

    def __init__(self, rows: Sequence[int] = ()) -> None:
        self.rows = list(rows)
        self.counts = Counter(self.rows)

    def until(self, length: int) -> History:
        """Itself when it is so long; else a copy of its beginning."""
        return self if length == len(self.rows) else History(self.rows[:length])

    def add(self, row: int) -> int:
        """How often it has occurred by now, this time included."""
        self.rows.append(row)
        self.counts[row] += 1
        return self.counts[row]
