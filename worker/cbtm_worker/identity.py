"""Who this worker is to a coordinator: an id and a key, kept in the cache folder, readable by its owner alone.

One process uses one identity at a time, guarded by a file lock; a second process on the same machine takes the next
free slot, so that the same join line can be started once for each GPU.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from cbtm_common.errors import ResourceExhausted
from cbtm_common.faults import point
from cbtm_common.files import is_disk_full

_MAX_SLOTS = 64


@dataclass(frozen=True, kw_only=True)
class Identity:
    worker_id: str
    # Ed25519, in hexadecimal. It never leaves this machine.
    private_key: str
    # Of the authority of the coordinator that it is known to; empty where that is checked by name.
    fingerprint: str = ""


class Slot:
    """A folder of one worker process: its identity, lease and checkpoints. Held until `release`."""

    def __init__(self, directory: Path, lock: FileLock) -> None:
        self.directory = directory
        self._lock = lock

    @property
    def tasks(self) -> Path:
        """Local checkpoints, by task."""
        return self.directory / "tasks"

    def load(self) -> Identity | None:
        """None also for a file that a power failure damaged: joining anew is what helps then."""
        return _read(self.directory)

    def save(self, identity: Identity) -> None:
        """Written whole or not at all, mode 0600. Raises ResourceExhausted when the disk is full."""
        temporary = self.directory / "identity.json.tmp"
        try:
            point("worker.register.after")
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                json.dump(asdict(identity), file)
                file.flush()
                os.fsync(descriptor)
            os.replace(temporary, self.directory / "identity.json")
        except OSError as error:
            if is_disk_full(error):
                raise ResourceExhausted(
                    f"the disk of {self.directory} is full: who this worker is cannot be kept"
                ) from error
            raise

    def forget(self) -> None:
        (self.directory / "identity.json").unlink(missing_ok=True)

    def release(self) -> None:
        self._lock.release()


def take_slot(cache_dir: Path, coordinator: str) -> Slot:
    """The first slot for `coordinator` that no other process holds. Raises ResourceExhausted when all are taken."""
    for directory in _directories(cache_dir, coordinator):
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / "lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        return Slot(directory, lock)
    raise ResourceExhausted(f"{_MAX_SLOTS} workers run from {cache_dir} already; use another --cache-dir")


def any_identity(cache_dir: Path, coordinator: str) -> Identity | None:
    """Of the first slot for `coordinator` that has one, also while its process runs."""
    return next(filter(None, map(_read, _directories(cache_dir, coordinator))), None)


def _directories(cache_dir: Path, coordinator: str) -> list[Path]:
    address = hashlib.sha256(coordinator.encode()).hexdigest()[:12]
    return [cache_dir / "workers" / f"{address}-{number}" for number in range(_MAX_SLOTS)]


def _read(directory: Path) -> Identity | None:
    try:
        return Identity(**json.loads((directory / "identity.json").read_text("utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None
