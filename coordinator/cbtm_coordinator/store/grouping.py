"""Group commit: calls that arrive while the database writes for others are written together, in one transaction.

Ten thousand workers renew their leases every half minute. One transaction each is a commit each, and a dozen round
trips; one for all that wait costs hardly more than one for one. Nobody waits for company: a call that finds nothing
under way begins at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from cbtm_common.errors import Unavailable

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class _Entry(Generic[_Item, _Result]):
    item: _Item
    # None: this caller is to work for itself and those who came after it.
    outcome: Future[_Result | Exception | None] = field(default_factory=Future)


class Group(Generic[_Item, _Result]):
    """Callable from many threads with one item each; `execute` gets the items that have gathered, at most `limit`.

    `execute` gives a result or an exception for each item, in order. When it raises itself, for more than one item,
    each is tried alone, so that nobody fails for another's sake; except for Unavailable, which would only repeat.
    """

    def __init__(
        self, execute: Callable[[Sequence[_Item]], Sequence[_Result | Exception]], *, limit: int = 128
    ) -> None:
        self._execute = execute
        self._limit = limit
        self._lock = threading.Lock()
        self._waiting: list[_Entry[_Item, _Result]] = []
        self._is_led = False

    def __call__(self, item: _Item) -> _Result:
        mine = _Entry[_Item, _Result](item)
        with self._lock:
            self._waiting.append(mine)
            leads, self._is_led = not self._is_led, True
        outcome = None if leads else mine.outcome.result()
        if outcome is None:
            outcome = self._lead()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _lead(self) -> _Result | Exception:
        """Carries out what has gathered, this thread's own first; then the next who waits does the same."""
        with self._lock:
            entries, self._waiting = self._waiting[: self._limit], self._waiting[self._limit :]
        try:
            outcomes = self._carry_out(entries)
        finally:
            with self._lock:
                following = self._waiting[0] if self._waiting else None
                self._is_led = following is not None
            if following is not None:
                following.outcome.set_result(None)
        for entry, outcome in zip(entries[1:], outcomes[1:], strict=True):
            entry.outcome.set_result(outcome)
        return outcomes[0]

    def _carry_out(self, entries: Sequence[_Entry[_Item, _Result]]) -> Sequence[_Result | Exception]:
        try:
            return self._execute([entry.item for entry in entries])
        except Exception as error:  # noqa: BLE001  # told to every caller
            if len(entries) == 1 or isinstance(error, Unavailable):
                return [error] * len(entries)
        return [outcome for entry in entries for outcome in self._carry_out([entry])]
