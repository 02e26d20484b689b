"""From a text to documents: cleaning, cutting, what is left out, and which part of the corpus each goes to.

All that looks random is a hash of the document's address, so the same texts always give the same documents.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass

SEED = "eco-corpus-1"
SHORTEST, LONGEST = 200, 8000  # characters
_BETWEEN = "\n\n"

_FREQUENT_WORDS = {
    language: frozenset(words.split())
    for language, words in {
        "en": "the of and to in is that for it with as are be this on by not or from which",
        "de": "der die das und ist nicht ein eine mit für auf werden wird sie zu den von dem des oder",
        "fr": "le la les de des et est une un pour dans que vous sur avec par ce pas du ou",
        "es": "el la los las de y que en un una para con por se es del no o al como",
    }.items()
}


@dataclass(frozen=True)
class Document:
    """A text of SHORTEST to LONGEST characters, and where it is from: package, file, and its number in that."""

    text: str
    source: str

    @property
    def file(self) -> str:
        return self.source.rpartition("#")[0]

    @property
    def fingerprint(self) -> bytes:
        """20 bytes, the same for texts whose letters, digits and underscores are the same in lower case."""
        return hashlib.sha1(re.sub(r"\W+", "", self.text.lower()).encode(), usedforsecurity=False).digest()


def number(*names: str) -> int:
    """A 64-bit hash of names."""
    return int.from_bytes(hashlib.sha256("\x00".join((SEED, *names)).encode()).digest()[:8], "big")


def clean(text: str) -> str:
    """NFC, one kind of line end, no control or format characters, and at most one blank line in a row."""
    for character, plain in (("\r\n", "\n"), ("\r", "\n"), ("\f", "\n"), ("\xa0", " "), ("\ufeff", "")):
        text = text.replace(character, plain)
    text = unicodedata.normalize("NFC", text)
    for character in set(text) - {"\n", "\t"}:
        if unicodedata.category(character) in ("Cc", "Cf", "Co", "Cs"):
            text = text.replace(character, "")
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def cut(text: str, address: str, *, shortest: int, by_line: bool = False) -> Iterator[Document]:
    """Cleans a text and cuts it at blank lines (or at every line) into documents.

    The lengths they aim at are log-uniform between `shortest` and LONGEST. What is left at the end goes to the last
    document where it is too short for one; a document that is still too short is dropped.
    """
    texts: list[str] = []
    current: list[str] = []
    length = 0
    for paragraph in _paragraphs(clean(text), by_line):
        longer = length + len(_BETWEEN) + len(paragraph)
        if current and (longer > LONGEST or length >= _target(address, len(texts), shortest)):
            texts.append(_BETWEEN.join(current))
            current, length = [], 0
        current.append(paragraph)
        length += len(paragraph) + len(_BETWEEN)
    if current:
        rest = _BETWEEN.join(current)
        if len(rest) < SHORTEST and texts and len(texts[-1]) + len(_BETWEEN) + len(rest) <= LONGEST:
            texts[-1] += _BETWEEN + rest
        else:
            texts.append(rest)
    for index, document in enumerate(texts):
        if SHORTEST <= len(document) <= LONGEST:
            yield Document(document, f"{address}#{index}")


def _target(address: str, index: int, shortest: int) -> int:
    fraction = number("len", address, str(index)) % 10_000 / 10_000
    return int(shortest * (LONGEST / shortest) ** fraction)


def _paragraphs(text: str, by_line: bool) -> Iterator[str]:
    """Of LONGEST characters at most: a longer one is cut, at the end of a line or word where there is one."""
    for paragraph in re.split(r"\n" if by_line else r"\n\s*\n", text):
        while len(paragraph) > LONGEST:
            at = _last_break(paragraph)
            yield paragraph[:at].rstrip()
            paragraph = paragraph[at:].lstrip("\n")
        if paragraph.strip():
            yield paragraph.rstrip()


def _last_break(paragraph: str) -> int:
    for character in "\n ":
        at = paragraph.rfind(character, LONGEST // 2, LONGEST)
        if at > 0:
            return at
    return LONGEST


def is_mostly_letters(text: str) -> bool:
    """False for tables of digits and for rulers."""
    return sum(c.isalpha() for c in text) >= 0.35 * len(text)


def is_in_language(text: str, language: str) -> bool:
    """By frequent words: enough of the language's own (`de`, `fr`, `es`), and twice as many as English ones."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    own, english = (sum(word in _FREQUENT_WORDS[name] for word in words) for name in (language, "en"))
    return own > 2 * english and own > 0.06 * len(words)


def chosen(documents: Collection[Document], domain: str, limit: float) -> list[Document]:
    """Documents at random, in that random order, until their text has `limit` bytes."""
    taken, size = [], 0
    for document in sorted(documents, key=lambda d: (number("pick", domain, d.source), d.source, d.text)):
        if size >= limit:
            break
        taken.append(document)
        size += len(document.text.encode())
    return taken


def is_for_validation(documents: Collection[Document]) -> list[bool]:
    """For each, whether it is of the 5 % that are held out: with its whole file, or by itself where there are fewer
    than 100 files.
    """
    by_file = len({document.file for document in documents}) >= 100
    return [number("split", d.file if by_file else d.source) % 20 == 0 for d in documents]
