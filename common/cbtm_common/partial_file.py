"""The `.part` file of a download, which outlives the process that began it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.errors import IntegrityError

_CHUNK = 1 << 18


class PartialFile:
    """Appended to, and hashed as it grows; never longer than `file` says. `size` is what it holds, in bytes."""

    def __init__(self, path: Path, file: pb.FileSpec) -> None:
        self.path = path
        self._expected = file
        self.size = 0

    def open(self) -> bool:
        """Opens it for appending; whether it holds bytes of an earlier attempt."""
        self._file = self.path.open("a+b")
        self._digest = hashlib.sha256()
        self.size = 0
        self._file.seek(0)
        while chunk := self._file.read(_CHUNK):
            self._digest.update(chunk)
            self.size += len(chunk)
        if self.size > self._expected.size:
            self.truncate()
        return self.size > 0

    def truncate(self) -> None:
        self._file.truncate(0)
        self._digest = hashlib.sha256()
        self.size = 0

    def write(self, chunk: bytes) -> None:
        if self.size + len(chunk) > self._expected.size:
            self.truncate()
            raise IntegrityError(f"{self._expected.path}: the store sends more than {self._expected.size} bytes")
        self._file.write(chunk)
        self._digest.update(chunk)
        self.size += len(chunk)

    def wrong(self) -> str:
        """Flushes to disk; what is wrong with the whole, or nothing."""
        self._file.flush()
        os.fsync(self._file.fileno())
        found = self._digest.hexdigest()
        if (self.size, found) == (self._expected.size, self._expected.sha256):
            return ""
        return (
            f"received {self.size} bytes with SHA-256 {found}, "
            f"expected {self._expected.size} with {self._expected.sha256}"
        )

    def close(self) -> None:
        self._file.close()
