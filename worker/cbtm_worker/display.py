"""What a volunteer sees: one live line on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from cbtm_common.cli import human_bytes, human_seconds

_PLAIN_SECONDS = 5.0
_LIVE_SECONDS = 0.25


@dataclass(kw_only=True)
class TaskView:
    """What there is to tell of the task in hand."""

    run: str
    what: str
    total_steps: int
    step: int = 0
    loss: float | None = None
    tokens_per_second: float = 0.0
    seconds_left: float | None = None
    lease_seconds: float = 0.0
    phase: str = ""
    saved_step: int = 0
    moved_bytes: int = 0

    def line(self) -> str:
        parts = [f"{self.run}/{self.what}", f"step {self.step:,}/{self.total_steps:,}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if self.tokens_per_second:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self.seconds_left is not None:
            parts.append(f"{human_seconds(self.seconds_left)} left")
        parts.append(f"saved {self.saved_step:,}")
        parts.append(f"lease {max(0.0, self.lease_seconds):.0f} s")
        if self.phase not in ("", "train"):
            parts.append(f"{self.phase} {human_bytes(self.moved_bytes)}" if self.moved_bytes else self.phase)
        return "  ".join(parts)


class Display:
    """Prints messages and keeps the live line; a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._last = 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(Text(""), console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, message: str) -> None:
        """One line that stays."""
        self.console.print(message, markup=False)

    def show(self, view: TaskView) -> None:
        """The task's line, as often as it is worth."""
        now = time.monotonic()
        if now - self._last < (_LIVE_SECONDS if self._live else _PLAIN_SECONDS):
            return
        self._last = now
        if self._live is not None:
            self._live.update(Text(view.line(), no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            self.console.print(view.line(), markup=False)
