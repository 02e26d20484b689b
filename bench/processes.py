"""Starts the processes that benchmarks measure, and stops them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cbtm_common.security import Security

_READY_SECONDS = 60


@dataclass(frozen=True, kw_only=True)
class RunningCoordinator:
    """Addresses of a coordinator on loopback; its data folder holds the tokens."""

    address: str
    http_url: str
    pid: int
    data_dir: Path
    # How to know it.
    security: Security


@contextmanager
def running_coordinator(
    data_dir: Path, environment: dict[str, str] | None = None, *, cores: Collection[int] | None = None
) -> Iterator[RunningCoordinator]:
    """`cbtm-coord init` and `serve` on free ports; SIGTERM at the end.

    `cores`: the only ones it may use, where it stands for a coordinator on another machine (Linux).
    """
    program = str(Path(sys.executable).parent / "cbtm-coord")
    variables = {**os.environ, **(environment or {}), "CBTM_DATA_DIR": str(data_dir)}
    subprocess.run([program, "init"], env=variables, check=True, stdout=subprocess.DEVNULL)
    log_path = data_dir / "serve.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [program, "serve", "--host", "127.0.0.1", "--port", "0", "--http-port", "0"],
            env=variables,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if cores is not None:
        # Before its threads begin, which get what it has.
        os.sched_setaffinity(process.pid, cores)
    try:
        found = None
        deadline = time.monotonic() + _READY_SECONDS
        while found is None and time.monotonic() < deadline and process.poll() is None:
            found = re.search(r"gRPC on (\S+?), objects on (\S+)", log_path.read_text())
            time.sleep(0.1)
        if found is None:
            raise RuntimeError(f"the coordinator did not start:\n{log_path.read_text()}")
        plain = bool((environment or {}).get("CBTM_INSECURE"))
        yield RunningCoordinator(
            address=found[1],
            http_url=f"http{'' if plain else 's'}://{found[2]}",
            pid=process.pid,
            data_dir=data_dir,
            security=Security(insecure=1) if plain else Security(ca_file=data_dir / "tls" / "ca.pem"),
        )
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
