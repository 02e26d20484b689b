"""The file formats of a corpus, each as a stream of (position, object): one item, never a whole file, in memory.

JSON lines and text may be compressed (gz, zst); a Parquet file is read a few rows of the needed columns at a time. What
is wrong with one line goes to `bad`; what is wrong with the file raises one of `read_errors(path)`.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TEXT_SUFFIXES = (".txt", ".md", ".text")
COMPRESSED = (".gz", ".zst")
# A longer line is skipped as bad: nothing that fits a document is so long, and memory stays bounded.
MAX_LINE_BYTES = 32 * 1024 * 1024
# A longer text becomes several documents of this many characters.
MAX_CHARACTERS = 1_000_000

_READ_BYTES = 1 << 18
_PARQUET_ROWS = 256

# (position in the file, why): a line that is left out.
OnBad = Callable[[int, str], None]
# Bytes of the file read since the last call, as they lie on disk.
OnBytes = Callable[[int], None]


def kind_of(path: Path) -> str:
    """'json', 'parquet', 'text', or '' for a file that is no part of a corpus."""
    suffixes = [s for s in path.suffixes if s not in COMPRESSED]
    last = suffixes[-1] if suffixes else ""
    if last in JSON_SUFFIXES:
        return "json"
    if last == ".parquet":
        return "parquet"
    return "text" if last in TEXT_SUFFIXES else ""


def read_errors(path: Path) -> tuple[type[Exception], ...]:
    """What reading a damaged or unreadable file of this kind may raise."""
    errors: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, zlib.error)
    if path.suffix == ".zst":
        import zstandard

        errors = (*errors, zstandard.ZstdError)
    if kind_of(path) == "parquet":
        import pyarrow as pa

        errors = (*errors, pa.ArrowException)
    return errors


def items(
    path: Path, *, text_field: str, columns: Sequence[str] | None, bad: OnBad, on_bytes: OnBytes
) -> Iterator[tuple[int, Any]]:
    """All items of a file. A text file has one field, `text_field`; of a Parquet file only `columns` are read."""
    kind = kind_of(path)
    if kind == "parquet":
        yield from _parquet(path, columns, on_bytes)
    elif kind == "text":
        with _opened(path, on_bytes) as file:
            yield from _text(file, text_field)
    else:
        with _opened(path, on_bytes) as file:
            yield from _json_lines(file, bad)


def parquet_columns(path: Path) -> list[str]:
    """Names of the columns of a Parquet file."""
    import pyarrow.parquet as pq

    return list(pq.read_schema(path).names)


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


@contextlib.contextmanager
def _opened(path: Path, on_bytes: OnBytes) -> Iterator[IO[bytes]]:
    with io.BufferedReader(_Counted(path, on_bytes), _READ_BYTES) as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=raw, mode="rb") as unpacked:
                yield io.BufferedReader(unpacked, _READ_BYTES)
        elif path.suffix == ".zst":
            import zstandard

            # Files put together from parts are many frames, one after the other.
            with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False) as reader:
                yield io.BufferedReader(reader, _READ_BYTES)
        else:
            yield raw


def _json_lines(file: IO[bytes], bad: OnBad) -> Iterator[tuple[int, Any]]:
    position = -1
    while line := file.readline(MAX_LINE_BYTES):
        position += 1
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            bad(position, f"is a line of over {MAX_LINE_BYTES:,} bytes")
            continue
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            bad(position, f"is not JSON: {error}")
            continue
        except RecursionError:
            bad(position, "is JSON nested too deep")
            continue
        yield position, item


def _parquet(path: Path, columns: Sequence[str] | None, on_bytes: OnBytes) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet as pq

    size, told, position = path.stat().st_size, 0, 0
    with pq.ParquetFile(path) as file:
        rows = max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            for row in batch.to_pylist():
                yield position, row
                position += 1
            done = size * position // rows
            on_bytes(done - told)
            told = done


def _text(file: IO[bytes], text_field: str) -> Iterator[tuple[int, Any]]:
    with io.TextIOWrapper(file, "utf-8", errors="replace") as text_file:
        position = 0
        while text := text_file.read(MAX_CHARACTERS):
            yield position, {text_field: text}
            position += 1
