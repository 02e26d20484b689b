"""Tokens a second over the last seconds."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

_WINDOW_SECONDS = 10.0


class Speed:
    """Counts tokens; `clock` gives seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tokens = 0
        self._marks: deque[tuple[float, int]] = deque([(clock(), 0)])

    def add(self, tokens: int) -> None:
        now = self._clock()
        self._tokens += tokens
        self._marks.append((now, self._tokens))
        while len(self._marks) > 2 and now - self._marks[1][0] > _WINDOW_SECONDS:
            self._marks.popleft()

    @property
    def tokens_per_second(self) -> float:
        (since, before), (now, tokens) = self._marks[0], self._marks[-1]
        return (tokens - before) / (now - since) if now > since else 0.0
