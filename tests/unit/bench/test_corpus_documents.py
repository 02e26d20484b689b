"""Cleaning, cutting and parting texts."""

from __future__ import annotations

from random import Random
from string import ascii_lowercase

import pytest

from bench.corpus.documents import (
    LONGEST,
    SHORTEST,
    Document,
    chosen,
    clean,
    cut,
    is_for_validation,
    is_in_language,
    is_mostly_letters,
)

PARAGRAPH = "A paragraph of words that say little, again and again, to be about as long as others are. " * 3


def documents(count: int, *, per_file: int = 1) -> list[Document]:
    return [Document(f"text {i}", f"file-{i // per_file}#{i % per_file}") for i in range(count)]


def test_cleaning() -> None:
    assert clean("\ufeffe\u0301\xa0a \t\r\nb\r\n\r\n\n\n\u200bc\x07\x0cd\te\n ") == "é a\nb\n\nc\nd\te"


@pytest.mark.parametrize("seed", range(10))
def test_documents_are_within_the_limits_and_lose_only_what_is_too_short(seed: int) -> None:
    random = Random(seed)
    lengths = [int(10 ** random.uniform(0, 4.3)) for _ in range(random.randint(1, 20))]
    paragraphs = ["".join(random.choices(ascii_lowercase, k=length)) for length in lengths]
    found = [document.text for document in cut("\n\n".join(paragraphs), "a", shortest=random.choice([200, 700, 1200]))]
    assert all(SHORTEST <= len(text) <= LONGEST for text in found)
    whole, at = "".join(paragraphs), 0
    for text in (text.replace("\n", "") for text in found):
        lost = whole.index(text, at) - at
        assert lost < SHORTEST
        at += lost + len(text)
    assert len(whole) - at < SHORTEST


def test_cutting_is_fixed_by_the_address_and_aims_at_many_lengths() -> None:
    text = "\n\n".join([PARAGRAPH] * 400)
    found = list(cut(text, "a", shortest=500))
    assert found == list(cut(text, "a", shortest=500))
    assert [d.source for d in found] == [f"a#{i}" for i in range(len(found))]
    lengths = [len(d.text) for d in found]
    assert min(lengths[:-1]) < 1000
    assert max(lengths) > 4000
    assert lengths != [len(d.text) for d in cut(text, "b", shortest=500)]


def test_a_paragraph_that_is_too_long_is_cut_at_a_word() -> None:
    words = " ".join(["word"] * 4000)
    found = [d.text for d in cut(words, "a", shortest=700)]
    assert all(text.startswith("word") and text.endswith("word") for text in map(str.strip, found))
    assert sum(text.count("word") for text in found) == 4000


def test_lines_may_be_paragraphs() -> None:
    lines = "\n".join(f"Line {i} is long enough to count for something, it says." for i in range(100))
    assert len(list(cut(lines, "a", shortest=700))) == 1
    assert len(list(cut(lines, "a", shortest=700, by_line=True))) > 1


def test_the_same_words_have_the_same_fingerprint() -> None:
    assert Document("One, two\n three.", "a#0").fingerprint == Document("one two three", "b#1").fingerprint
    assert Document("one two three", "a#0").fingerprint != Document("one two four", "a#0").fingerprint


def test_languages_and_tables_are_told_apart() -> None:
    german = "Der Befehl wird mit den Optionen der Datei und dem Namen für die Ausgabe auf dem Bildschirm verwendet."
    english = "The command is used with options of the file, and it prints the names that are in it to the screen."
    assert is_in_language(german, "de")
    assert not is_in_language(english, "de")
    assert not is_in_language(german, "fr")
    assert is_mostly_letters(english)
    assert not is_mostly_letters("| 1 | 2 | 3 |\n+---+---+---+")


def test_documents_are_chosen_at_random_up_to_the_limit() -> None:
    all_of_them = documents(1000)
    found = chosen(all_of_them, "domain", 300)
    size = sum(len(d.text) for d in found)
    assert 300 <= size < 300 + len(found[-1].text)
    assert found == chosen(list(reversed(all_of_them)), "domain", 300)
    assert found != chosen(all_of_them, "other", 300)
    assert len(chosen(all_of_them, "domain", 1e9)) == 1000


def test_files_are_held_out_whole_where_there_are_many() -> None:
    many = documents(4000, per_file=4)
    held_out = is_for_validation(many)
    assert 0.03 < sum(held_out) / len(many) < 0.07
    assert all(len(set(held_out[at : at + 4])) == 1 for at in range(0, len(many), 4))
    few = documents(4000, per_file=100)
    files = {document.file for document, held in zip(few, is_for_validation(few), strict=True) if held}
    assert len(files) > 30
