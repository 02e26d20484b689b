"""Files of many records: dictionaries, proofs, articles, codes of diagnoses, licences with a header."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator

_ICD10_NOTES = {
    "includes": "Includes",
    "inclusionTerm": "Also",
    "excludes1": "Excludes (never together)",
    "excludes2": "Excludes (may coexist)",
    "codeFirst": "Code first",
    "useAdditionalCode": "Use additional code",
    "codeAlso": "Code also",
    "notes": "Note",
}
_DICTD_HEADERS = 5  # entries that are about the dictionary itself


def dictionary_text(text: str) -> str:
    """A dictd dictionary: each entry a paragraph, those of 60 characters or fewer left out."""
    entries = re.split(r"\n(?=\S)", text)  # a headword starts in the first column
    kept = [entry for entry in entries[_DICTD_HEADERS:] if len(entry) > 60]
    return "\n\n".join(_one_paragraph(entry).strip("\n") for entry in kept)


def metamath_text(text: str) -> str:
    """A Metamath database: each axiom or theorem with its comment, a paragraph."""
    statement = r"\$\(.*?\$\)\s*(?:\$[{}]\s*)?[^$\s]+ \$[ap].*?\$\."
    return "\n\n".join(_one_paragraph(found) for found in re.findall(statement, text, re.DOTALL))


def _one_paragraph(text: str) -> str:
    return re.sub(r"\n\s*\n", "\n", text)


def licence_text(text: str) -> str:
    """A licence of ScanCode's without its YAML header. Nothing when the header says that it is in another language."""
    header = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if header is None:
        return text
    return "" if "language:" in header[1] else text[header.end() :]


def wikitext_articles(text: str) -> Iterator[tuple[str, str]]:
    """Articles of WikiText, their number and text. Its marks around punctuation in words and numbers are undone."""
    for index, article in enumerate(re.split(r"(?m)^(?= = [^=\n].*[^=\n] = $)", text)):
        for mark in "-,.":
            article = article.replace(f" @{mark}@ ", mark)
        yield str(index), article.replace(" \n", "\n\n")


def icd10_sections(text: str) -> Iterator[tuple[str, str]]:
    """Sections of ICD-10-CM's tabular list: id, and a paragraph for each three-character code with those below it."""
    for section in ET.fromstring(text).iterfind("chapter/section"):
        codes = ["\n".join(_diagnosis(diagnosis, "")) for diagnosis in section.findall("diag")]
        yield section.get("id", ""), "\n\n".join([section.findtext("desc", ""), *codes])


def _diagnosis(diagnosis: ET.Element, indent: str) -> Iterator[str]:
    yield f"{indent}{diagnosis.findtext('name')} {diagnosis.findtext('desc')}"
    for tag, label in _ICD10_NOTES.items():
        for note in diagnosis.iterfind(f"{tag}/note"):
            yield f"{indent}  {label}: {note.text}"
    for below in diagnosis.findall("diag"):
        yield from _diagnosis(below, indent + "  ")
