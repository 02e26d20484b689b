"""Texts out of files. A format takes a file's text and gives (section, text) pairs; most files are one section, ""."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from bench.corpus.formats.html_pages import html_text
from bench.corpus.formats.pod import pod_text
from bench.corpus.formats.records import dictionary_text, icd10_sections, licence_text, metamath_text, wikitext_articles
from bench.corpus.formats.roff import roff_text
from bench.corpus.formats.source_code import without_licence

Section = tuple[str, str]


def _whole(extract: Callable[[str], str]) -> Callable[[str], Iterable[Section]]:
    return lambda text: [("", extract(text))]


FORMATS: dict[str, Callable[[str], Iterable[Section]]] = {
    "plain": _whole(str),
    "html": _whole(html_text),
    "roff": _whole(roff_text),
    "pod": _whole(pod_text),
    "code": _whole(without_licence),
    "dictionary": _whole(dictionary_text),
    "licence": _whole(licence_text),
    "metamath": _whole(metamath_text),
    "wikitext": wikitext_articles,
    "icd10": icd10_sections,
}
