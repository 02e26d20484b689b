"""Micro-batches that were found to fit, kept for the next task of the same model on the same card. No torch.

A file that cannot be read or written costs a probe of the memory, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock

from cbtm_worker.train.memory import Placement

_log = logging.getLogger(__name__)
_LOCK_SECONDS = 10.0
# What a model's config says of its files and of texts, not of what a pass takes.
_NOT_OF_THE_SHAPE = ("_name_or_path", "transformers_version", "dtype", "bos_token_id", "eos_token_id", "pad_token_id")


def placement_key(
    config: dict[str, Any], *, sequence_length: int, precision: str, device: str, device_bytes: int, shares: int = 1
) -> str:
    """What the memory of a pass depends on: the model's shape, the sequence, the precision, the card, and how many
    devices share the model."""
    shape = {name: value for name, value in config.items() if name not in _NOT_OF_THE_SHAPE}
    said = [shape, sequence_length, precision, device, device_bytes, shares]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


class PlacementCache:
    """`path` holds {key: placement}, its micro-batch the largest that fits, whatever the global batch. Many processes
    may use one file; None keeps nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def get(self, key: str) -> Placement | None:
        entry = self._read().get(key)
        try:
            return None if entry is None else Placement(**entry)
        except TypeError as error:
            _log.warning("%s: an entry is not read: %s", self._path, error)
            return None

    def put(self, key: str, placement: Placement) -> None:
        if self._path is None:
            return
        temporary = self._path.with_suffix(".tmp")
        try:
            with FileLock(self._path.with_suffix(".lock"), timeout=_LOCK_SECONDS):
                temporary.write_text(json.dumps({**self._read(), key: asdict(placement)}, indent=1), "utf-8")
                temporary.replace(self._path)
        except OSError as error:
            _log.warning("%s: the micro-batch that fits is not kept: %s", self._path, error)

    def _read(self) -> dict[str, dict[str, Any]]:
        if self._path is None or not self._path.exists():
            return {}
        try:
            entries = json.loads(self._path.read_text("utf-8"))
            if not isinstance(entries, dict):
                raise ValueError("is no JSON object")
        except (OSError, ValueError) as error:
            _log.warning("%s: is not read: %s", self._path, error)
            return {}
        return entries
