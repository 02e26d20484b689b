"""Reads documents from JSONL (plain, gz, zst), Parquet and folders of text files, one at a time.

A bad line is counted, sampled into the report and skipped. What is wrong with the whole (no file, no such field,
nothing in it) is an InvalidArgument that names the field, raised before any work by `open_corpus`.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from cbtm_common.errors import InvalidArgument

_JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
_TEXT_SUFFIXES = (".txt", ".md", ".text")
_COMPRESSED = (".gz", ".zst")
_MAX_SAMPLED_ERRORS = 20
# A text file longer than this is cut into documents of this many characters.
_MAX_TEXT_CHARACTERS = 1_000_000
_PEEKED_LINES = 1000


@dataclass(frozen=True, kw_only=True)
class Document:
    """`id` is the id field's, or a hash of file and position: stable for the same files."""

    id: str
    text: str


@dataclass(frozen=True, kw_only=True)
class BadLine:
    where: str
    why: str


@dataclass(kw_only=True)
class ReadReport:
    """What one pass over the corpus met."""

    documents: int = 0
    characters: int = 0
    bad_lines: int = 0
    samples: list[BadLine] = field(default_factory=list)

    def bad(self, where: str, why: str) -> None:
        self.bad_lines += 1
        if len(self.samples) < _MAX_SAMPLED_ERRORS:
            self.samples.append(BadLine(where=where, why=why))


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Files in a fixed order, and the fields to read."""

    files: tuple[Path, ...]
    text_field: str = "text"
    id_field: str | None = None

    @property
    def total_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def documents(self, report: ReadReport, *, on_file: Any = None) -> Iterator[Document]:
        """All documents in order. `on_file(path)` is called after each file, for progress."""
        for path in self.files:
            for position, item in self._items(path, report):
                document = self._document(path, position, item, report)
                if document is not None:
                    report.documents += 1
                    report.characters += len(document.text)
                    yield document
            if on_file is not None:
                on_file(path)

    def _document(self, path: Path, position: int, item: Any, report: ReadReport) -> Document | None:
        where = f"{path}:{position + 1}"
        if not isinstance(item, dict):
            report.bad(where, "is not an object")
            return None
        text = item.get(self.text_field)
        if not isinstance(text, str) or not text.strip():
            report.bad(where, f"field {self.text_field!r} is missing, empty or not text")
            return None
        if self.id_field is None:
            digest = hashlib.sha256(f"{path.name}\0{position}".encode()).hexdigest()[:20]
            return Document(id=digest, text=text)
        given = item.get(self.id_field)
        if not isinstance(given, str | int):
            report.bad(where, f"field {self.id_field!r} is missing or neither text nor a whole number")
            return None
        return Document(id=str(given), text=text)

    def _items(self, path: Path, report: ReadReport) -> Iterator[tuple[int, Any]]:
        kind = _kind(path)
        try:
            if kind == "parquet":
                yield from _parquet(path)
            elif kind == "text":
                yield from _text(path, self.text_field)
            else:
                yield from _json_lines(path, report)
        except (OSError, EOFError, ValueError) as error:
            report.bad(str(path), f"cannot be read further: {error}")


def open_corpus(patterns: Sequence[str], *, text_field: str = "text", id_field: str | None = None) -> Corpus:
    """Finds the files and looks into the first of them. Raises InvalidArgument before any work.

    A pattern is a file, a folder (searched through) or a glob (`**` goes into folders).
    """
    files: list[Path] = []
    for pattern in patterns:
        found = _expand(pattern)
        if not found:
            raise InvalidArgument(
                f"corpus: nothing readable at {pattern!r}; expected {', '.join(_JSON_SUFFIXES)} (plain, .gz, .zst), "
                f".parquet or {', '.join(_TEXT_SUFFIXES)}",
                field="corpus",
            )
        files += found
    corpus = Corpus(files=tuple(dict.fromkeys(files)), text_field=text_field, id_field=id_field)
    _check_fields(corpus)
    return corpus


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_file():
        return [path] if _kind(path) else []
    inside = path.rglob("*") if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
    return sorted(p for p in inside if p.is_file() and _kind(p))


def _kind(path: Path) -> str:
    suffixes = [s for s in path.suffixes if s not in _COMPRESSED]
    last = suffixes[-1] if suffixes else ""
    if last in _JSON_SUFFIXES:
        return "json"
    if last == ".parquet":
        return "parquet"
    return "text" if last in _TEXT_SUFFIXES else ""


def _check_fields(corpus: Corpus) -> None:
    """Reads on until one document is found, and says what is there when none is."""
    report = ReadReport()
    seen: set[str] = set()
    for path in corpus.files:
        for number, (_, item) in enumerate(corpus._items(path, report)):
            if isinstance(item, dict):
                seen |= set(item)
                wanted = [corpus.text_field, *([corpus.id_field] if corpus.id_field else [])]
                if all(name in item for name in wanted):
                    return
            if number >= _PEEKED_LINES:
                break
    if not seen:
        first = f": {report.samples[0].where} {report.samples[0].why}" if report.samples else ""
        raise InvalidArgument(f"corpus: its {len(corpus.files)} file(s) hold no document{first}", field="corpus")
    missing = corpus.text_field if corpus.text_field not in seen else str(corpus.id_field)
    name = "text-field" if missing == corpus.text_field else "id-field"
    raise InvalidArgument(f"{name}: no document has a field {missing!r}; there are {sorted(seen)}", field=name)


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import zstandard

        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True))
    return path.open("rb")


def _json_lines(path: Path, report: ReadReport) -> Iterator[tuple[int, Any]]:
    with _open(path) as lines:
        for position, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                yield position, json.loads(line)
            except ValueError as error:
                report.bad(f"{path}:{position + 1}", f"is not JSON: {error}")


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet as pq

    position = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                yield position, row
                position += 1


def _text(path: Path, text_field: str) -> Iterator[tuple[int, Any]]:
    with io.TextIOWrapper(_open(path), "utf-8", errors="replace") as file:
        position = 0
        while text := file.read(_MAX_TEXT_CHARACTERS):
            yield position, {text_field: text}
            position += 1
