"""The file formats of a corpus, each as a stream of (position, object): one item, never a whole file, in memory.

JSON lines and text may be compressed (gz, zst); a Parquet file is read a few rows of the needed columns at a time. What
is wrong with one line goes to `bad`; what is wrong with a file, so that no more of it can be read, raises `Unreadable`.
"""

from __future__ import annotations

import codecs
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cbtm_common.errors import InvalidArgument
from cbtm_coordinator.clustering.streams import COMPRESSED, OnBytes, opened

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TEXT_SUFFIXES = (".txt", ".md", ".text")
# A longer line is skipped as bad: nothing that fits a document is so long, and memory stays bounded.
MAX_LINE_BYTES = 64 * 1024 * 1024
# A longer text becomes several documents of this many characters.
MAX_CHARACTERS = 1_000_000

_PARQUET_ROWS = 256
_PARQUET_BUFFER = 1 << 20
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

# (position in the file, why): a line that is left out.
OnBad = Callable[[int, str], None]


class Unreadable(Exception):
    """Nothing of a file can be read from `position` on; the message says why, and what to do."""

    def __init__(self, position: int, why: str) -> None:
        super().__init__(why)
        self.position = position


def kind_of(path: Path) -> str:
    """'json', 'parquet', 'text', or '' for a file that is no part of a corpus."""
    suffixes = [s for s in map(str.lower, path.suffixes) if s not in COMPRESSED]
    last = suffixes[-1] if suffixes else ""
    if last in JSON_SUFFIXES:
        return "json"
    if last == ".parquet":
        return "parquet"
    return "text" if last in TEXT_SUFFIXES else ""


def items(
    path: Path, *, text_field: str, id_field: str | None, bad: OnBad, on_bytes: OnBytes
) -> Iterator[tuple[int, Any]]:
    """All items of a file: objects with at least the fields named, where the file has them.

    A text file has one field, `text_field`. Raises Unreadable.
    """
    last = -1

    def on_bad(position: int, why: str) -> None:
        nonlocal last
        last = position
        bad(position, why)

    try:
        for position, item in _items(path, text_field, id_field, on_bad, on_bytes):
            last = position
            yield position, item
    except _read_errors(path) as error:
        raise Unreadable(last + 1, _why(error)) from error


def parquet_columns(path: Path, *, text_field: str, id_field: str | None) -> list[str]:
    """Names of the columns. Raises InvalidArgument when those of the two fields are not there or of another type.

    Raises Unreadable when this is no Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise Unreadable(0, _why(error)) from error
    wanted = [("text-field", text_field, "text", _is_text)]
    if id_field is not None:
        wanted.append(("id-field", id_field, "text or whole numbers", lambda kind: _is_text(kind) or _is_whole(kind)))
    for option, name, what, fits in wanted:
        places = schema.get_all_field_indices(name)
        if len(places) != 1:
            count = "several columns" if places else "no column"
            raise InvalidArgument(f"{option}: {path} has {count} {name!r}; there are {schema.names}", field=option)
        kind = schema.field(places[0]).type
        if not fits(kind):
            raise InvalidArgument(f"{option}: column {name!r} of {path} is {kind}, not {what}", field=option)
    return list(schema.names)


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_whole(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_integer(kind))


def _read_errors(path: Path) -> tuple[type[Exception], ...]:
    """What reading a damaged file of this kind may raise."""
    errors: tuple[type[Exception], ...] = (OSError, EOFError, ValueError, zlib.error)
    if path.suffix.lower() == ".zst":
        import zstandard

        errors = (*errors, zstandard.ZstdError)
    if kind_of(path) == "parquet":
        import pyarrow as pa

        errors = (*errors, pa.ArrowException)
    return errors


def _why(error: Exception) -> str:
    if isinstance(error, _OtherEncoding):
        return str(error)
    said = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())[:300]
    return f"{said}; replace it, or leave it out"


def _items(
    path: Path, text_field: str, id_field: str | None, bad: OnBad, on_bytes: OnBytes
) -> Iterator[tuple[int, Any]]:
    kind = kind_of(path)
    if kind == "parquet":
        yield from _parquet(path, list(dict.fromkeys([text_field, id_field or text_field])), bad, on_bytes)
        return
    with opened(path, on_bytes) as file:
        if file.peek(2)[:2] in _UTF16:
            raise _OtherEncoding("it is UTF-16, not UTF-8; convert it (iconv -f UTF-16 -t UTF-8), or leave it out")
        yield from _text(file, text_field) if kind == "text" else _json_lines(file, bad)


class _OtherEncoding(ValueError):
    """The message says what to do."""


def _json_lines(file: io.BufferedReader[Any], bad: OnBad) -> Iterator[tuple[int, Any]]:
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
        except UnicodeDecodeError as error:
            bad(position, f"is not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start + 1}")
        except json.JSONDecodeError as error:
            bad(position, f"is not JSON: {error.msg} at character {error.pos + 1}")
        except ValueError as error:
            bad(position, f"is not JSON: {error}")
        except RecursionError:
            bad(position, "is JSON nested too deep")
        else:
            yield position, item


def _parquet(path: Path, columns: list[str], bad: OnBad, on_bytes: OnBytes) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet as pq

    size, told, position = path.stat().st_size, 0, 0
    # Without a buffer, columns of whole row groups, often of a gigabyte, would be in memory.
    options = {"buffer_size": _PARQUET_BUFFER, "pre_buffer": False, "page_checksum_verification": True}
    with pq.ParquetFile(path, **options) as file:
        rows = max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            yield from _rows(batch, position, bad)
            position += batch.num_rows
            done = size * position // rows
            on_bytes(done - told)
            told = done


def _rows(batch: Any, first: int, bad: OnBad) -> Iterator[tuple[int, Any]]:
    try:
        rows = batch.to_pylist()
    except UnicodeDecodeError:
        rows = None
    if rows is not None:
        yield from enumerate(rows, first)
        return
    for index in range(batch.num_rows):
        try:
            (row,) = batch.slice(index, 1).to_pylist()
        except UnicodeDecodeError:
            bad(first + index, "is not UTF-8")
        else:
            yield first + index, row


def _text(file: io.BufferedReader[Any], text_field: str) -> Iterator[tuple[int, Any]]:
    # What is not UTF-8 becomes lone surrogates, by which its document is known as bad.
    with io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape") as text_file:
        position = 0
        while text := text_file.read(MAX_CHARACTERS):
            yield position, {text_field: text}
            position += 1
