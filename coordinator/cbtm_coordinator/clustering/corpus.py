"""A corpus as a stream of documents, from JSONL (plain, gz, zst), Parquet and folders of text files.

A bad line is counted, sampled into the report and skipped; so is the rest of a file that breaks off in its middle. What
is wrong with the whole (no file, one that cannot be opened, no such field, nothing in it) is an InvalidArgument that
names the field, raised before any work by `open_corpus`. Text files are read as UTF-8, bytes that are none replaced.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cbtm_common.errors import InvalidArgument
from cbtm_coordinator.clustering import formats

_MAX_SAMPLED_ERRORS = 20
_PEEKED_ITEMS = 1000


@dataclass(frozen=True, kw_only=True)
class Document:
    """`id` is the id field's, or else a hash of the text: then equal texts have equal ids, wherever they lie."""

    id: str
    text: str


@dataclass(frozen=True, kw_only=True)
class BadLine:
    where: str
    why: str


@dataclass(kw_only=True)
class ReadReport:
    """What one pass over the corpus met; `samples` are the first few of its bad lines."""

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

    @property
    def fields(self) -> list[str]:
        return [self.text_field, *([self.id_field] if self.id_field else [])]

    def documents(self, report: ReadReport, *, on_bytes: Callable[[int], None] = lambda _: None) -> Iterator[Document]:
        """All documents in order; one of over a million characters comes as several, with one id if it has its own.

        `on_bytes` hears of bytes read from disk; they add up to `total_bytes`, nearly so when files are damaged.
        """
        for path in self.files:
            for position, item in self._items(path, report, on_bytes):
                for document in self._documents(path, position, item, report):
                    report.documents += 1
                    report.characters += len(document.text)
                    yield document

    def _documents(self, path: Path, position: int, item: Any, report: ReadReport) -> Iterator[Document]:
        where = f"{path}:{position + 1}"
        if not isinstance(item, dict):
            report.bad(where, "is not an object")
            return
        text = item.get(self.text_field)
        if not isinstance(text, str) or not text.strip():
            report.bad(where, f"field {self.text_field!r} is missing, empty or not text")
            return
        given = None if self.id_field is None else item.get(self.id_field)
        if self.id_field is not None and not isinstance(given, str | int):
            report.bad(where, f"field {self.id_field!r} is missing or neither text nor a whole number")
            return
        try:
            encoded = [(piece, piece.encode()) for piece in _pieces(text) if piece.strip()]
            str(given).encode()
        except UnicodeEncodeError:
            # Half of a surrogate pair, which JSON can escape and nothing can encode.
            report.bad(where, "holds half a character (a lone surrogate)")
            return
        for piece, data in encoded:
            yield Document(id=hashlib.sha256(data).hexdigest()[:32] if given is None else str(given), text=piece)

    def _items(self, path: Path, report: ReadReport, on_bytes: Callable[[int], None]) -> Iterator[tuple[int, Any]]:
        errors = formats.read_errors(path)
        try:
            yield from formats.items(
                path,
                text_field=self.text_field,
                columns=self._columns(path),
                bad=lambda position, why: report.bad(f"{path}:{position + 1}", why),
                on_bytes=on_bytes,
            )
        except errors as error:
            report.bad(str(path), f"cannot be read further: {error}")

    def _columns(self, path: Path) -> list[str] | None:
        if formats.kind_of(path) != "parquet":
            return None
        # A column that is not there reads as a missing field, document by document.
        return [name for name in formats.parquet_columns(path) if name in self.fields]


def open_corpus(patterns: Sequence[str], *, text_field: str = "text", id_field: str | None = None) -> Corpus:
    """Finds the files and looks into the beginning of each. Raises InvalidArgument before any work.

    A pattern is a file, a folder (searched through) or a glob (`**` goes into folders).
    """
    files: list[Path] = []
    for pattern in patterns:
        found = _expand(str(Path(pattern).expanduser()))
        if not found:
            raise InvalidArgument(
                f"corpus: nothing readable at {pattern!r}; expected {', '.join(formats.JSON_SUFFIXES)} (plain, .gz, "
                f".zst), .parquet or {', '.join(formats.TEXT_SUFFIXES)}",
                field="corpus",
            )
        files += found
    corpus = Corpus(files=tuple(dict.fromkeys(files)), text_field=text_field, id_field=id_field)
    _check(corpus)
    return corpus


def _pieces(text: str) -> list[str]:
    size = formats.MAX_CHARACTERS
    return [text] if len(text) <= size else [text[start : start + size] for start in range(0, len(text), size)]


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_file():
        return [path] if formats.kind_of(path) else []
    inside = path.rglob("*") if path.is_dir() else map(Path, glob.glob(pattern, recursive=True))
    return sorted(p for p in inside if p.is_file() and formats.kind_of(p))


def _check(corpus: Corpus) -> None:
    """Opens every file; reads on until one document is found, and says what is there when none is."""
    report = ReadReport()
    seen: set[str] = set()
    found = False
    for path in corpus.files:
        for names in _peek(corpus, path, report, 1 if found else _PEEKED_ITEMS):
            seen |= names
            if names.issuperset(corpus.fields):
                found = True
                break
    if found:
        return
    if not seen:
        first = f": {report.samples[0].where} {report.samples[0].why}" if report.samples else ""
        raise InvalidArgument(f"corpus: its {len(corpus.files)} file(s) hold no document{first}", field="corpus")
    missing = corpus.text_field if corpus.text_field not in seen else str(corpus.id_field)
    name = "text-field" if missing == corpus.text_field else "id-field"
    raise InvalidArgument(f"{name}: no document has a field {missing!r}; there are {sorted(seen)}", field=name)


class _Enough(Exception):
    """So many bad lines were met that looking further is no longer a look."""


def _peek(corpus: Corpus, path: Path, report: ReadReport, limit: int) -> Iterator[set[str]]:
    """Field names of the first items of a file. Raises InvalidArgument when not even the first can be read."""
    good = bad = 0

    def on_bad(position: int, why: str) -> None:
        nonlocal bad
        report.bad(f"{path}:{position + 1}", why)
        bad += 1
        if bad >= _PEEKED_ITEMS:
            raise _Enough

    errors = formats.read_errors(path)
    try:
        if formats.kind_of(path) == "parquet":
            yield set(formats.parquet_columns(path))
            return
        items = formats.items(path, text_field=corpus.text_field, columns=None, bad=on_bad, on_bytes=lambda _: None)
        for _, item in items:
            good += 1
            if isinstance(item, dict):
                yield set(item)
            if good >= limit:
                return
    except _Enough:
        return
    except errors as error:
        if good + bad == 0:
            raise InvalidArgument(f"corpus: {path} cannot be read: {error}", field="corpus") from error
