"""`cbtm-coord serve` as a process: starts the coordinator, says where it is, waits for a signal, drains."""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
from types import FrameType
from typing import NoReturn

from rich.console import Console

from cbtm_common.signals import SignalFlag
from cbtm_coordinator.config import ADDRESS_NAME, JOIN_TOKEN_NAME, CoordinatorConfig
from cbtm_coordinator.server import Coordinator
from cbtm_coordinator.setup import name_authority

# What draining takes beside waiting for calls, at most, in seconds: with 20 for those, it is less than 30.
_SPARE_SECONDS = 9.0
_ALL_INTERFACES = ("0.0.0.0", "::")  # noqa: S104  # compared


def run_until_signalled(config: CoordinatorConfig) -> NoReturn:
    """Serves until SIGTERM or SIGINT, drains, and ends the process.

    With 0; with 1, and the stacks of all threads on stderr, when draining does not end in the time that it has.
    """
    stop = SignalFlag()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    coordinator = Coordinator(config)
    name_authority(config, coordinator.fingerprint)
    coordinator.start()
    address = config.data_dir / ADDRESS_NAME
    local_host = "127.0.0.1" if config.host in _ALL_INTERFACES else config.host
    address.write_text(f"{_bracketed(local_host)}:{coordinator.port}\n", "utf-8")
    _announce(config, coordinator)
    stop.wait()
    sys.stderr.write("stopping: no new calls, those in progress finish (again to leave at once)\n")
    # A thread of its own that needs no interpreter: whatever hangs, the process ends.
    faulthandler.dump_traceback_later(config.drain_seconds + _SPARE_SECONDS, exit=True)
    coordinator.stop()
    # The interpreter would wait for every thread, and so for a store that does not answer.
    os._exit(0)


def _announce(config: CoordinatorConfig, coordinator: Coordinator) -> None:
    console = Console(highlight=False, soft_wrap=True)
    host = _bracketed(config.advertise_host or guess_host(config.host))
    console.print(f"gRPC on {config.host}:{coordinator.port}", end="")
    console.print(f", objects on {config.host}:{coordinator.http_port}" if coordinator.http_port else "")
    token_path = config.data_dir / JOIN_TOKEN_NAME
    token = token_path.read_text("utf-8").strip() if token_path.exists() else "TOKEN"
    console.print("Volunteers join with:")
    plain = " --insecure" * config.insecure
    console.print(f"  cbtm-worker join --coordinator {host}:{coordinator.port} --token {token}{plain}", markup=False)
    sys.stdout.flush()


def _bracketed(host: str) -> str:
    """As it stands before a port."""
    return f"[{host}]" if ":" in host else host


def guess_host(bound: str) -> str:
    """The address under which others probably reach this machine."""
    if bound not in _ALL_INTERFACES:
        return bound
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Sends nothing: asks the system which of its addresses leads to the outside (TEST-NET-1, RFC 5737).
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
