"""A real `cbtm-coord` process on loopback, and the command line beside it, as a run owner has them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from cbtm_common.rpc import Connection, connect
from cbtm_common.security import Security

_PROGRAM = [sys.executable, "-c", "from cbtm_coordinator.cli import main; main()"]
_LINE = re.compile(r"gRPC on 127\.0\.0\.1:(\d+), objects on 127\.0\.0\.1:(\d+)")
_START_SECONDS, _END_SECONDS = 60, 40


def coord(*arguments: str, data_dir: Path, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`cbtm-coord` with `arguments`, run to its end."""
    return subprocess.run(
        [*_PROGRAM, *arguments],
        capture_output=True,
        text=True,
        env=_environment({"CBTM_DATA_DIR": str(data_dir), **(env or {})}),
        cwd=data_dir.parent,
        timeout=120,
    )


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Ours without what would configure a coordinator by accident."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CBTM_")}
    return {**clean, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", **extra}


class RunningCoordinator:
    """`cbtm-coord serve` of one data folder. After `kill` or `stop`, `start` brings it back on the same ports."""

    def __init__(self, data_dir: Path, env: Mapping[str, str]) -> None:
        self.data_dir = data_dir
        self.port = self.http_port = 0
        self._env = dict(env)
        self._process: subprocess.Popen[str] | None = None
        self._log_path = data_dir.with_name(data_dir.name + ".log")

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None, "the coordinator was not started"
        return self._process

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """What it wrote to stderr, over all its starts."""
        return self._log_path.read_text("utf-8")

    def token(self, name: str) -> str:
        """The one that `init` made: "admin" or "join"."""
        return (self.data_dir / f"{name}.token").read_text("utf-8").strip()

    def connect(self, credential: str | None = None, *, attempts: int = 20) -> Connection:
        """A connection that waits for a restart."""
        return connect(self.target, token=credential, security=self.security, attempts=attempts)

    @property
    def security(self) -> Security:
        """How to know it without a token."""
        return Security(ca_file=self.data_dir / "tls" / "ca.pem")

    def channel(self, options: Sequence[tuple[str, Any]] = ()) -> grpc.Channel:
        """A channel that knows nothing of our interceptors."""
        return self.security.trust("127.0.0.1", self.port, "").channel(self.target, options)

    def coord(self, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return coord(*arguments, data_dir=self.data_dir, env=env)

    def start(self) -> None:
        """Starts it and returns when it has said where it listens."""
        serve = ["serve", "--host", "127.0.0.1", "--port", str(self.port), "--http-port", str(self.http_port)]
        with self._log_path.open("a") as log:
            self._process = subprocess.Popen(
                [*_PROGRAM, *serve, "--log-level", "info"],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment({"CBTM_DATA_DIR": str(self.data_dir), **self._env}),
                cwd=self.data_dir.parent,
            )
        assert self._process.stdout is not None
        # A process that hangs before its first line is killed, and that ends the wait for it.
        watchdog = threading.Timer(_START_SECONDS, self._process.kill)
        watchdog.start()
        found = _LINE.match(self._process.stdout.readline())
        watchdog.cancel()
        if found is None:
            self.kill()
            raise AssertionError(f"the coordinator did not start; it wrote:\n{self.log}")
        self.port, self.http_port = int(found[1]), int(found[2])

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self._reap()

    def stop(self) -> int:
        """SIGTERM, then SIGKILL when it does not go; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> int:
        """Its exit code, once it has ended by itself; killed when it does not."""
        watchdog = threading.Timer(_END_SECONDS, self.process.kill)
        watchdog.start()
        code = self._reap()
        watchdog.cancel()
        return code

    def _reap(self) -> int:
        code = self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@contextlib.contextmanager
def running_coordinator(folder: Path, **env: str) -> Iterator[RunningCoordinator]:
    """`init` and `serve` on a data folder in `folder`, with `env` as its environment; ended on leaving."""
    data_dir = folder / "coordinator"
    made = coord("init", data_dir=data_dir, env=env)
    assert made.returncode == 0, made.stderr
    running = RunningCoordinator(data_dir, {"CBTM_REAPER_SECONDS": "0.2", "CBTM_THREADS": "8", **env})
    running.start()
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()
