"""Child processes of the demo: started with a log file each, watched, and stopped whatever happens."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_STOP_SECONDS = 30
_TAIL_LINES = 20


class ProcessFailed(Exception):
    """A process ended with an error; the message holds the end of its log."""


class Processes:
    """A context manager: what it started is stopped when it is left."""

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        log_dir.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # Workers first, so that they can still hand in what they have.
        for name in reversed(list(self._running)):
            self.stop(name)

    def log_path(self, name: str) -> Path:
        return self._log_dir / f"{name}.log"

    def start(self, name: str, command: Sequence[str], *, environment: dict[str, str] | None = None) -> None:
        """Starts `command` (a console script of this environment) with its output in `NAME.log`."""
        with self.log_path(name).open("wb") as log:
            self._running[name] = subprocess.Popen(
                [str(Path(sys.executable).parent / command[0]), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                # Ctrl-C in the terminal reaches the demo alone, which then stops its children in order.
                start_new_session=True,
            )

    def run(self, name: str, command: Sequence[str]) -> None:
        """Runs `command` to its end, its output on this terminal. Raises ProcessFailed."""
        done = subprocess.run([str(Path(sys.executable).parent / command[0]), *command[1:]], check=False)
        if done.returncode != 0:
            raise ProcessFailed(f"{name} ended with exit code {done.returncode}")

    def check(self) -> None:
        """Raises ProcessFailed when a process ended with an error."""
        for name, process in self._running.items():
            if process.poll() not in (None, 0):
                raise ProcessFailed(
                    f"{name} ended with exit code {process.returncode}; the end of its log:\n{self.tail(name)}"
                )

    def is_running(self, name: str) -> bool:
        return name in self._running and self._running[name].poll() is None

    def tail(self, name: str) -> str:
        lines = self.log_path(name).read_text("utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_TAIL_LINES:])

    def stop(self, name: str) -> None:
        process = self._running.pop(name)
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
