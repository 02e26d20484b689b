"""Where documents wait on disk to be packed: token ids and document lengths of each (cluster, split), appended to.

All spools share one bounded buffer in memory; nothing else grows with the corpus.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# A cluster's index and a split.
Key = tuple[int, str]

_BUFFER_BYTES = 64 * 1024 * 1024


class Spools:
    """Appends documents by key. `directory` must hold no spools yet; one writer."""

    def __init__(self, directory: Path, dtype: np.dtype[Any], *, buffer_bytes: int = _BUFFER_BYTES) -> None:
        self._directory = directory
        self._dtype = dtype
        self._buffer_bytes = buffer_bytes
        self._tokens: dict[Key, bytearray] = {}
        self._lengths: dict[Key, array[int]] = {}
        self._buffered = 0

    def append(self, key: Key, ids: Sequence[int]) -> None:
        """Adds one document."""
        data = np.asarray(ids, dtype=self._dtype).tobytes()
        self._tokens.setdefault(key, bytearray()).extend(data)
        self._lengths.setdefault(key, array("q")).append(len(ids))
        self._buffered += len(data) + 8
        if self._buffered >= self._buffer_bytes:
            self.flush()

    def flush(self) -> None:
        """Files are opened only here, one at a time: with K = 1,024 there are more spools than file descriptors."""
        for key, tokens in self._tokens.items():
            with self._tokens_path(key).open("ab") as file:
                file.write(tokens)
            with self._lengths_path(key).open("ab") as file:
                file.write(self._lengths[key].tobytes())
        self._tokens, self._lengths, self._buffered = {}, {}, 0

    def documents(self, key: Key) -> int:
        """How many documents wait under `key`."""
        self.flush()
        path = self._lengths_path(key)
        return path.stat().st_size // 8 if path.exists() else 0

    def read(self, key: Key) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """(token ids [N], document lengths [D]), both mapped from disk."""
        if not self.documents(key):
            return np.zeros(0, dtype=self._dtype), np.zeros(0, dtype=np.int64)
        return (
            np.memmap(self._tokens_path(key), dtype=self._dtype, mode="r"),
            np.memmap(self._lengths_path(key), dtype=np.int64, mode="r"),
        )

    def take_last(self, key: Key) -> list[int]:
        """Removes the last document and returns its ids."""
        tokens, lengths = self.read(key)
        size = int(lengths[-1])
        ids: list[int] = tokens[len(tokens) - size :].tolist()
        left, documents = len(tokens) - size, len(lengths) - 1
        del tokens, lengths
        _truncate(self._tokens_path(key), left * self._dtype.itemsize)
        _truncate(self._lengths_path(key), documents * 8)
        return ids

    def drop(self, key: Key) -> None:
        """Deletes what waits under `key`."""
        self._tokens_path(key).unlink(missing_ok=True)
        self._lengths_path(key).unlink(missing_ok=True)

    def _tokens_path(self, key: Key) -> Path:
        return self._directory / f"c{key[0]:04d}.{key[1].lower()}.tokens"

    def _lengths_path(self, key: Key) -> Path:
        return self._directory / f"c{key[0]:04d}.{key[1].lower()}.lengths"


def _truncate(path: Path, size: int) -> None:
    with path.open("r+b") as file:
        file.truncate(size)
