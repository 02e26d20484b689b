"""`cbtm-worker check`: whether this machine can take part, line by line, and what to mend where it cannot."""

from __future__ import annotations

import hashlib
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.cli import human_bytes
from cbtm_common.errors import CbtmError, Unauthenticated
from cbtm_common.protos import from_timestamp
from cbtm_common.rpc import Connection, connect
from cbtm_common.security import split_token
from cbtm_common.transfer import Transfer
from cbtm_worker.config import WorkerConfig
from cbtm_worker.hardware import choose_devices, describe
from cbtm_worker.identity import Identity, take_slot
from cbtm_worker.session import Session

_PROBE_BYTES = 4 * 1024 * 1024
_CONNECT_SECONDS = 10.0
# Weights, gradients and two moments of AdamW in float32.
_BYTES_PER_PARAMETER = 16
# Shards, checkpoints on their way and the next one, beside the model.
_DISK_MODELS = 4
_SLOW_BYTES_PER_SECOND = 256 * 1024


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line. `ok` None: worth knowing, no obstacle. `remedy` says what to mend."""

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""


def check(config: WorkerConfig, tell: Callable[[Finding], None]) -> bool:
    """Whether nothing stands in the way; each finding is told as it is made."""
    findings: list[Finding] = []

    def found(name: str, ok: bool | None, detail: str, remedy: str = "") -> None:
        finding = Finding(name=name, ok=ok, detail=detail, remedy="" if ok else remedy)
        findings.append(finding)
        tell(finding)

    slot = take_slot(config.cache_dir, config.coordinator)
    identity = slot.load()
    slot.release()
    fingerprint = identity.fingerprint if identity else ""
    with connect(config.coordinator, token=config.token, fingerprint=fingerprint, attempts=1) as connection:
        if not connection.wait_until_ready(_CONNECT_SECONDS):
            found(
                "reachability",
                False,
                f"nothing answers at {config.coordinator} within {_CONNECT_SECONDS:.0f} s",
                "ask the owner for the address, and for a token that carries the coordinator's fingerprint; see that "
                "outbound connections to this port are allowed",
            )
            return False
        found("reachability", True, f"{config.coordinator} answers")
        probe = _token(config, identity, connection, found)
        if probe is not None:
            _coordinator(probe, found)
            _machine(config, probe, found)
            _link(connection, probe, found)
    return all(f.ok is not False for f in findings)


def _token(
    config: WorkerConfig, identity: Identity | None, connection: Connection, found: Callable[..., None]
) -> ws.ProbeResponse | None:
    """Asks for a probe as the worker that joined from here before, or with the join token."""
    token = split_token(config.token)[0] if config.token else None
    callers: list[tuple[str, str | Identity | None]] = [("the join token is good", token)]
    if identity is not None:
        callers.insert(0, (f"joined before as {identity.worker_id}", identity))
    request = ws.ProbeRequest(transfer_bytes=_PROBE_BYTES, sha256=hashlib.sha256(_probe_bytes()).hexdigest())
    refused = "no token was given"
    for who, caller in callers:
        if caller is None:
            continue
        if isinstance(caller, Identity):
            Session(connection).use(caller)
        else:
            connection.credential = caller
        started = time.monotonic()
        try:
            answer = connection.worker.Probe(request)
        except Unauthenticated as error:
            # Of a registry that is gone, perhaps; `join` would then join anew with the token.
            refused = error.message
            continue
        except CbtmError as error:
            refused = error.message
            break
        found("token", True, f"{who} (answer in {1000 * (time.monotonic() - started):.0f} ms)")
        return answer
    found("token", False, refused, "ask the run's owner for a new token and pass it with --token")
    return None


def _coordinator(probe: ws.ProbeResponse, found: Callable[..., None]) -> None:
    ours = version("cbtm")
    enough = _as_tuple(ours) >= _as_tuple(probe.min_worker_version)
    found(
        "version",
        enough,
        f"{ours} here, {probe.server_version} there, {probe.min_worker_version} at least",
        "upgrade: pip install -U cbtm",
    )
    skew = (datetime.now(UTC) - from_timestamp(probe.server_time)).total_seconds()
    detail = f"this clock is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"
    # Leases are timed by the coordinator alone; only TLS certificates and log lines mind.
    found("clock", True if abs(skew) < 60 else None, detail, "set the clock (NTP); training does not depend on it")


def _machine(config: WorkerConfig, probe: ws.ProbeResponse, found: Callable[..., None]) -> None:
    try:
        devices = choose_devices(config.device)
    except CbtmError as error:
        found("device", False, error.message, "pass another --device")
        return
    device = devices[0]
    hardware = describe(device, config.cache_dir)
    found("device", True, f"{device} ({hardware.device_name}), torch {hardware.torch_version}")
    if not probe.run_name:
        found("memory", None, "no run is open now, so its model cannot be compared")
        return
    need = probe.model_parameters * _BYTES_PER_PARAMETER
    # Logits of one sequence dominate the activations of a small model.
    have, where = hardware.device_memory_bytes, f"on {device}"
    if have <= 1.2 * need and hardware.device_type == "cuda" and len(devices) > 1:
        have, where = len(devices) * have, f"on {len(devices)} devices, which would share the model"
    found(
        "memory",
        have > 1.2 * need,
        f"{human_bytes(have)} {where}; {probe.run_name} needs {human_bytes(need)} and activations "
        f"({probe.model_parameters:,} parameters, {probe.sequence_length} tokens)",
        "use a device with more memory, or join another run with --run",
    )
    free = shutil.disk_usage(config.cache_dir).free
    found(
        "disk",
        free > _DISK_MODELS * need,
        f"{human_bytes(free)} free under {config.cache_dir}; about {human_bytes(_DISK_MODELS * need)} are used",
        "free some space, or pass --cache-dir on a larger disk",
    )


def _link(connection: Connection, probe: ws.ProbeResponse, found: Callable[..., None]) -> None:
    with tempfile.TemporaryDirectory() as scratch, Transfer.beside(connection) as transfer:
        source, target = Path(scratch) / "up", Path(scratch) / "down"
        source.write_bytes(_probe_bytes())
        try:
            started = time.monotonic()
            transfer.upload(probe.upload, source)
            up = _PROBE_BYTES / (time.monotonic() - started)
            started = time.monotonic()
            transfer.download(probe.download, target)
            down = _PROBE_BYTES / (time.monotonic() - started)
        except CbtmError as error:
            found("object store", False, error.message, "see that outbound HTTP(S) to the store is allowed")
            return
    for name, speed in (("upload", up), ("download", down)):
        size = probe.model_parameters * _BYTES_PER_PARAMETER
        detail = f"{human_bytes(speed)}/s" + (f"; a checkpoint takes about {size / speed:.0f} s" if size else "")
        found(name, True if speed > _SLOW_BYTES_PER_SECOND else None, detail, "slow, but it works")


_random = secrets.token_bytes(_PROBE_BYTES)


def _probe_bytes() -> bytes:
    """Random, so that nothing on the way can compress it."""
    return _random


def _as_tuple(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())
