"""A file of a corpus as a stream of bytes, unpacked where it is compressed (gz, zst), in bounded memory."""

from __future__ import annotations

import contextlib
import gzip
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

COMPRESSED = (".gz", ".zst")

_READ_BYTES = 1 << 18
# All that these unpack to is in memory at once: half a GiB at worst, when a file is one byte repeated.
_ZSTD_BYTES = 1 << 13
# Of `zstd --long=31`, with which large public corpora are packed. The memory is taken only by frames that ask for it.
_ZSTD_WINDOW = 1 << 31

# Bytes of the file read since the last call, as they lie on disk.
OnBytes = Callable[[int], None]


@contextlib.contextmanager
def opened(path: Path, on_bytes: OnBytes) -> Iterator[io.BufferedReader[Any]]:
    """Reading raises OSError, EOFError (the file breaks off), zlib.error or zstandard.ZstdError."""
    with io.BufferedReader(_Counted(path, on_bytes), _READ_BYTES) as raw:
        packing = path.suffix.lower()
        if packing == ".gz":
            with gzip.GzipFile(fileobj=raw, mode="rb") as unpacked:
                yield io.BufferedReader(unpacked, _READ_BYTES)
        elif packing == ".zst":
            yield io.BufferedReader(_ZstdFrames(raw), _READ_BYTES)
        else:
            yield raw


class _Counted(io.RawIOBase):
    """A file that tells how many bytes were read of it."""

    def __init__(self, path: Path, on_bytes: OnBytes) -> None:
        self._file = path.open("rb", buffering=0)
        self._on_bytes = on_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self._on_bytes(count)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _ZstdFrames(io.RawIOBase):
    """All frames of a Zstandard file (RFC 8878), one after the other, as files put together from parts have them.

    Raises EOFError when the file ends within a frame, which zstandard's own stream reader takes for the end.
    """

    def __init__(self, packed: io.BufferedReader[Any]) -> None:
        import zstandard

        self._packed = packed
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._frame: Any = None
        self._rest = b""
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            data = self._rest or self._packed.read(_ZSTD_BYTES)
            self._rest = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._unpacked = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._unpacked))
        buffer[:count] = self._unpacked[:count]
        self._unpacked = self._unpacked[count:]
        return count
