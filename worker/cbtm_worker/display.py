"""What a volunteer sees: one live line on a terminal, a plain line every few seconds elsewhere.

A terminal or pipe that goes away while the worker works silences it, and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable
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
    """What there is to tell of the task in hand. Seconds and bytes."""

    run: str
    what: str
    total_steps: int
    step: int = 0
    loss: float | None = None
    tokens_per_second: float = 0.0
    seconds_left: float | None = None
    lease_seconds: float = 0.0
    # Since the coordinator last answered, when it should have by now.
    silent_seconds: float | None = None
    phase: str = ""
    saved_step: int = 0
    fetched_bytes: int = 0
    # (step, bytes sent, bytes in all) of the checkpoint that is on its way.
    sending: tuple[int, int, int] | None = None

    def line(self) -> str:
        parts = [f"{self.run}/{self.what}", f"step {self.step:,}/{self.total_steps:,}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.3f}")
        if self.tokens_per_second:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self.seconds_left is not None:
            parts.append(f"{human_seconds(self.seconds_left)} left")
        parts.append(f"saved {self.saved_step:,}")
        if self.phase == "download":
            parts.append(f"download {human_bytes(self.fetched_bytes)}")
        if self.sending is not None:
            step, sent, total = self.sending
            parts.append(f"upload of {step:,}: {human_bytes(min(sent, total))} of {human_bytes(total)}")
        if self.silent_seconds is None:
            parts.append(f"lease {max(0.0, self.lease_seconds):.0f} s")
        else:
            parts.append(f"no answer from the coordinator for {human_seconds(self.silent_seconds)}")
        return "  ".join(parts)


class WorkerConsole(Console):
    """Goes silent when nobody reads it any more; rich's would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class Display:
    """Prints messages and keeps the live line; a context manager; its methods may be called from any thread."""

    def __init__(
        self, console: Console | None = None, *, prefix: str = "", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or WorkerConsole(highlight=False, soft_wrap=True)
        # Of every line, where several workers write to one terminal.
        self._prefix = prefix
        self._clock = clock
        self._live: Live | None = None
        self._next = clock()

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(Text(""), console=self.console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        live, self._live = self._live, None
        if live is not None:
            self._quietly(live.stop)

    def say(self, message: str) -> None:
        """One line that stays."""
        self._quietly(lambda: self.console.print(self._prefix + message, markup=False))

    def show(self, view: TaskView) -> None:
        """The task's line, as often as it is worth."""
        now = self._clock()
        if now < self._next:
            return
        live = self._live
        self._next = now + (_LIVE_SECONDS if live else _PLAIN_SECONDS)
        if live is not None:
            text = Text(view.line(), no_wrap=True, overflow="ellipsis")
            self._quietly(lambda: live.update(text, refresh=True))
        else:
            self.say(view.line())

    def rest(self) -> None:
        """No task is in hand: the line goes."""
        live = self._live
        if live is not None:
            self._quietly(lambda: live.update(Text(""), refresh=True))

    def _quietly(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError:
            # The terminal is closed. Training matters more than telling.
            self.console.quiet = True
