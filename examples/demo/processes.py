"""Child processes of the demo: started with a log file each, watched, and stopped whatever happens."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

_STOP_SECONDS = 30.0
_START_SECONDS = 60.0
_TAIL_LINES = 20


class ProcessFailed(Exception):
    """A process ended with an error; the message holds the end of its log."""


class Processes:
    """A context manager: what it started is stopped when it is left, the first one last, since it serves the others.

    Ctrl-C while they are being stopped kills them.
    """

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        log_dir.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        first, others = list(self._running)[:1], list(self._running)[1:]
        try:
            self.stop(*others)
            self.stop(*first)
        finally:
            for process in self._running.values():
                process.kill()
                process.wait()

    def log_path(self, name: str) -> Path:
        return self._log_dir / f"{name}.log"

    def start(self, name: str, command: Sequence[str]) -> None:
        """Starts `command` (a console script of this environment) with its output in `NAME.log`."""
        with self.log_path(name).open("wb") as log:
            self._running[name] = subprocess.Popen(
                _with_full_path(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Ctrl-C in the terminal reaches the demo alone, which then stops its children in order.
                start_new_session=True,
            )

    def run(self, name: str, command: Sequence[str]) -> None:
        """Runs `command` to its end, its output on this terminal. Raises ProcessFailed."""
        process = subprocess.Popen(_with_full_path(command))
        try:
            code = process.wait()
        except BaseException:
            _stop([process])
            raise
        if code != 0:
            raise ProcessFailed(f"{name} ended with exit code {code}; it says why above")

    def check(self) -> None:
        """Raises ProcessFailed when a process ended with an error."""
        for name, process in self._running.items():
            if process.poll() not in (None, 0):
                raise ProcessFailed(
                    f"{name} ended with exit code {process.returncode}; the end of its log:\n{self.tail(name)}"
                )

    def wait_for_line(self, name: str, beginning: str) -> str:
        """The first line of a log that begins so, once it is there. Raises ProcessFailed after a minute without it."""
        pause = threading.Event()
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            self.check()
            for line in self.log_path(name).read_text("utf-8", errors="replace").splitlines():
                if line.strip().startswith(beginning):
                    return line.strip()
            pause.wait(0.1)
        raise ProcessFailed(f"{name} did not print {beginning!r}; the end of its log:\n{self.tail(name)}")

    def is_running(self, name: str) -> bool:
        return name in self._running and self._running[name].poll() is None

    def tail(self, name: str) -> str:
        lines = self.log_path(name).read_text("utf-8", errors="replace").splitlines()
        return "\n".join(lines[-_TAIL_LINES:])

    def stop(self, *names: str) -> None:
        """Asks all of them to leave at once, and kills those that have not after half a minute."""
        _stop([self._running[name] for name in names])
        for name in names:
            del self._running[name]


def _with_full_path(command: Sequence[str]) -> list[str]:
    return [str(Path(sys.executable).parent / command[0]), *command[1:]]


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + _STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
