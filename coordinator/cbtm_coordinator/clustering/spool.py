"""Where documents wait on disk to be packed: token ids and document lengths of each (cluster, split), appended to.

All spools share one bounded buffer in memory; nothing else grows with the corpus.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# A cluster's index and a split.
Key = tuple[int, str]
# Bytes of the two files of a spool, token ids and lengths.
Sizes = tuple[int, int]

_BUFFER_BYTES = 64 * 1024 * 1024
_NOTHING: Sizes = (0, 0)


class Spools:
    """Appends documents by key; one writer. What `directory` holds counts only so far as `sizes` says."""

    def __init__(
        self,
        directory: Path,
        dtype: np.dtype[Any],
        *,
        sizes: Mapping[Key, Sizes] | None = None,
        buffer_bytes: int = _BUFFER_BYTES,
    ) -> None:
        self._directory = directory
        self._dtype = dtype
        self._buffer_bytes = buffer_bytes
        self._buffers: dict[Key, tuple[bytearray, bytearray]] = {}
        self._buffered = 0
        self._sizes = dict(sizes or {})
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.glob("*.spool"):
            cluster, split, which, _ = path.name.split(".")
            size = self._sizes.get((int(cluster), split.upper()), _NOTHING)[which == "lengths"]
            if size:
                with path.open("r+b") as file:
                    file.truncate(size)
            else:
                path.unlink()

    def extend(self, key: Key, tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int64]) -> None:
        """Adds documents, one after the other in `tokens`."""
        held = self._buffers.setdefault(key, (bytearray(), bytearray()))
        for buffer, data in zip(held, (tokens.astype(self._dtype, copy=False), lengths), strict=True):
            buffer.extend(data.tobytes())
            self._buffered += data.nbytes
        if self._buffered >= self._buffer_bytes:
            self.flush()

    def flush(self) -> dict[Key, Sizes]:
        """All on disk; its sizes. Files are opened here alone, one at a time: K = 1,024 would need 4,096 at once."""
        for key, buffers in self._buffers.items():
            old = self._sizes.get(key, _NOTHING)
            for path, data in zip(self._paths(key), buffers, strict=True):
                with path.open("ab") as file:
                    file.write(data)
            self._sizes[key] = (old[0] + len(buffers[0]), old[1] + len(buffers[1]))
        self._buffers, self._buffered = {}, 0
        return dict(self._sizes)

    def read(self, key: Key) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """(token ids [N], document lengths [D]), both mapped from disk."""
        if not self.flush().get(key, _NOTHING)[1]:
            return np.zeros(0, dtype=self._dtype), np.zeros(0, dtype=np.int64)
        tokens, lengths = self._paths(key)
        return np.memmap(tokens, dtype=self._dtype, mode="r"), np.memmap(lengths, dtype=np.int64, mode="r")

    def drop(self, key: Key) -> None:
        """Deletes what waits under `key`."""
        self._sizes.pop(key, None)
        for path in self._paths(key):
            path.unlink(missing_ok=True)

    def _paths(self, key: Key) -> tuple[Path, Path]:
        stem = f"{key[0]:04d}.{key[1].lower()}"
        return self._directory / f"{stem}.tokens.spool", self._directory / f"{stem}.lengths.spool"
