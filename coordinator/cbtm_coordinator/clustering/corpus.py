"""A corpus as a stream of documents, from JSONL (plain, gz, zst), Parquet and folders of text files.

A bad line is counted, sampled into the report and skipped. A file of which the rest cannot be read, or that changes
while it is read, is noted in the report, and the other files are read on: `ReadReport.check_whole` refuses the corpus
then, naming all such files at once. What can be seen to be wrong without reading everything (no file, one that cannot
be opened, no such field, nothing in it) is an InvalidArgument that names the field, raised by `open_corpus`.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from cbtm_common.errors import InvalidArgument
from cbtm_coordinator.clustering import formats

_MAX_SAMPLED_ERRORS = 20
_MAX_NAMED_FILES = 3
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
    """What one pass over the corpus met.

    `samples` are the first few of its bad lines, `broken` all files of which not everything could be read.
    """

    documents: int = 0
    characters: int = 0
    bad_lines: int = 0
    samples: list[BadLine] = field(default_factory=list)
    broken: list[BadLine] = field(default_factory=list)

    def bad(self, where: str, why: str) -> None:
        self.bad_lines += 1
        if len(self.samples) < _MAX_SAMPLED_ERRORS:
            self.samples.append(BadLine(where=where, why=why))

    def check_whole(self) -> None:
        """Raises InvalidArgument when a part of the corpus could not be read: how much is missing, nobody knows."""
        if not self.broken:
            return
        named = "; ".join(f"{broken.where} {broken.why}" for broken in self.broken[:_MAX_NAMED_FILES])
        count = len(self.broken)
        more = f"; and {count - _MAX_NAMED_FILES:,} more" if count > _MAX_NAMED_FILES else ""
        raise InvalidArgument(f"corpus: {count:,} file(s) cannot be read to the end: {named}{more}", field="corpus")


@dataclass(frozen=True, kw_only=True)
class CorpusFile:
    """A file as it was when the corpus was opened: `size` in bytes, time of its last change."""

    path: Path
    size: int
    mtime_ns: int

    @classmethod
    def at(cls, path: Path) -> Self:
        """Raises OSError."""
        found = path.stat()
        return cls(path=path, size=found.st_size, mtime_ns=found.st_mtime_ns)

    def change(self) -> str:
        """What has happened to it since, or nothing."""
        try:
            now = self.at(self.path)
        except FileNotFoundError:
            return "is gone"
        except OSError as error:
            return f"cannot be reached: {error.strerror}"
        if now == self:
            return ""
        return "changed" + (f" from {self.size:,} to {now.size:,} bytes" if now.size != self.size else "")

    def where(self, position: int) -> str:
        """Its name and the number of a line."""
        return f"{_shown(self.path)}:{position + 1}"


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Files in a fixed order, and the fields to read."""

    files: tuple[CorpusFile, ...]
    text_field: str = "text"
    id_field: str | None = None

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def fields(self) -> list[str]:
        return [self.text_field, *([self.id_field] if self.id_field else [])]

    def documents(self, report: ReadReport, *, on_bytes: Callable[[int], None] = lambda _: None) -> Iterator[Document]:
        """All documents in order; one of over a million characters comes as several, with one id if it has its own.

        `on_bytes` hears of bytes read from disk; they add up to `total_bytes`, nearly so when files are damaged.
        """
        for file in self.files:
            for position, item in self._items(file, report, on_bytes):
                for document in self._documents(file, position, item, report):
                    report.documents += 1
                    report.characters += len(document.text)
                    yield document

    def _documents(self, file: CorpusFile, position: int, item: Any, report: ReadReport) -> Iterator[Document]:
        if not isinstance(item, dict):
            report.bad(file.where(position), "is not an object")
            return
        text = item.get(self.text_field)
        if not isinstance(text, str) or not text.strip():
            report.bad(file.where(position), f"field {self.text_field!r} is missing, empty or not text")
            return
        given = None if self.id_field is None else item.get(self.id_field)
        if self.id_field is not None and not isinstance(given, str | int):
            why = f"field {self.id_field!r} is missing or neither text nor a whole number"
            report.bad(file.where(position), why)
            return
        try:
            encoded = [(piece, piece.encode()) for piece in _pieces(text) if piece.strip()]
            str(given).encode()
        except UnicodeEncodeError:
            # Half of a surrogate pair, which JSON can escape and nothing can encode; in text, any undecodable byte.
            plain = formats.kind_of(file.path) == "text"
            report.bad(file.where(position), "is not UTF-8" if plain else "holds half a character (a lone surrogate)")
            return
        for piece, data in encoded:
            yield Document(id=hashlib.sha256(data).hexdigest()[:32] if given is None else str(given), text=piece)

    def _items(
        self, file: CorpusFile, report: ReadReport, on_bytes: Callable[[int], None]
    ) -> Iterator[tuple[int, Any]]:
        broken: BadLine | None = None
        try:
            yield from formats.items(
                file.path,
                text_field=self.text_field,
                id_field=self.id_field,
                bad=lambda position, why: report.bad(file.where(position), why),
                on_bytes=on_bytes,
            )
        except formats.Unreadable as error:
            broken = BadLine(where=file.where(error.position), why=f"cannot be read: {error}")
        if change := file.change():
            why = f"{change} since the corpus was opened; try again once nothing writes to it"
            broken = BadLine(where=_shown(file.path), why=why)
        if broken:
            report.broken.append(broken)


def open_corpus(patterns: Sequence[str], *, text_field: str = "text", id_field: str | None = None) -> Corpus:
    """Finds the files and looks into the beginning of each. Raises InvalidArgument before any work.

    A pattern is a file, a folder (searched through) or a glob (`**` goes into folders).
    """
    # A file that is found by two names is read once.
    files: dict[Path, CorpusFile] = {}
    for pattern in patterns:
        try:
            found = [CorpusFile.at(path) for path in _found(pattern)]
        except OSError as error:
            raise InvalidArgument(
                f"corpus: {error.filename} cannot be read: {error.strerror}", field="corpus"
            ) from error
        if not found:
            raise InvalidArgument(
                f"corpus: nothing readable at {pattern!r}; expected {', '.join(formats.JSON_SUFFIXES)} (plain, .gz, "
                f".zst), .parquet or {', '.join(formats.TEXT_SUFFIXES)}",
                field="corpus",
            )
        for file in found:
            files.setdefault(file.path.resolve(), file)
    corpus = Corpus(files=tuple(files.values()), text_field=text_field, id_field=id_field)
    _check(corpus)
    return corpus


def _pieces(text: str) -> list[str]:
    size = formats.MAX_CHARACTERS
    return [text] if len(text) <= size else [text[start : start + size] for start in range(0, len(text), size)]


def _shown(path: Path) -> str:
    """Its name as text, also when that is no UTF-8: it goes into the report and to the terminal."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _found(pattern: str) -> list[Path]:
    """Raises OSError for a folder that cannot be looked into: what is in it would be missing unnoticed."""
    if not pattern:
        raise InvalidArgument("corpus: is empty; name a file, a folder or a glob", field="corpus")
    path = Path(os.path.expanduser(pattern))
    if path.is_file():
        return [path] if formats.kind_of(path) else []
    inside = _walk(path) if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    return sorted(p for p in inside if formats.kind_of(p) and p.is_file())


def _walk(folder: Path) -> Iterator[Path]:
    def refused(error: OSError) -> None:
        raise error

    for parent, _, names in os.walk(folder, onerror=refused):
        yield from (Path(parent, name) for name in names)


def _check(corpus: Corpus) -> None:
    """Opens every file; reads on until one document is found, and says what is there when none is."""
    report = ReadReport()
    seen: set[str] = set()
    found = False
    for file in corpus.files:
        for names in _peek(corpus, file, report, 1 if found else _PEEKED_ITEMS):
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


def _peek(corpus: Corpus, file: CorpusFile, report: ReadReport, limit: int) -> Iterator[set[str]]:
    """Field names of the first items of a file. Raises InvalidArgument when not even the first can be read."""
    good = bad = 0

    def on_bad(position: int, why: str) -> None:
        nonlocal bad
        report.bad(file.where(position), why)
        bad += 1
        if bad >= _PEEKED_ITEMS:
            raise _Enough

    text_field, id_field = corpus.text_field, corpus.id_field
    try:
        if formats.kind_of(file.path) == "parquet":
            yield set(formats.parquet_columns(file.path, text_field=text_field, id_field=id_field))
            return
        items = formats.items(file.path, text_field=text_field, id_field=id_field, bad=on_bad, on_bytes=lambda _: None)
        for _, item in items:
            good += 1
            if isinstance(item, dict):
                yield set(item)
            if good >= limit:
                return
    except _Enough:
        return
    except formats.Unreadable as error:
        if good + bad == 0:
            raise InvalidArgument(f"corpus: {_shown(file.path)} cannot be read: {error}", field="corpus") from error
