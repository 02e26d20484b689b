"""Text to terms: the one place that says what a term is, for clustering, sharding, scoring and generation.

A term is a lower-cased word of two or more characters (`\\w\\w+` between word boundaries, Unicode), with words that
begin with a digit left out. There is no list of stop words: how rare a term is weighs it, in any language. A term
depends on the text inside its own span alone, which is what makes routing incremental: as a context grows only its
last, unfinished word can change.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# A run of word characters is matched whole, so boundaries need not be asked for.
WORD = re.compile(r"\w\w+")


def term_of(word: str) -> str | None:
    """The term that a word counts as, or None when it counts for nothing."""
    lower = word.lower()
    return None if len(word) < 2 or lower[0].isdigit() else lower


def terms(text: str) -> list[str]:
    """The terms of `text`, in order, repeats kept. scikit-learn's `analyzer`."""
    found = (term_of(match.group()) for match in WORD.finditer(text))
    return [term for term in found if term is not None]


def written_words(text: str) -> list[bytes]:
    """Each word of `text`, lower-cased, in UTF-8, in order; words that are no terms are among them: ask `term_of`.

    Bytes are split by translation, in a fifth of the time that matching takes.
    """
    if not text.isascii():
        # These two are lower-cased by their neighbours, and to more than one letter.
        if "\N{GREEK CAPITAL LETTER SIGMA}" in text or "\N{LATIN CAPITAL LETTER I WITH DOT ABOVE}" in text:
            return [word.lower().encode("utf-8", "surrogatepass") for word in WORD.findall(text)]
        text = _BEYOND_ASCII.sub(" ", text.lower())
    return text.encode("utf-8", "surrogatepass").translate(_SPLIT).split()


def words(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each maximal run of word characters in `text`, single characters included."""
    for match in _RUN.finditer(text):
        yield match.span()


_RUN = re.compile(r"\w+")
# What is neither a word character nor ASCII.
_BEYOND_ASCII = re.compile(r"[^\w\x00-\x7f]+")
# ASCII word characters to lower case, all other ASCII to a space; the bytes of what is beyond stay.
_SPLIT = bytes(
    code if code >= 128 else ord(chr(code).lower()) if _RUN.match(chr(code)) else ord(" ") for code in range(256)
)
