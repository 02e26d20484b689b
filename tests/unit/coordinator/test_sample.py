"""The sample: uniform, bounded, the same for a seed."""

from __future__ import annotations

from collections import Counter

from cbtm_coordinator.clustering.corpus import Document
from cbtm_coordinator.clustering.sample import MAX_CHARACTERS, reservoir


def documents(count: int, length: int = 1) -> list[Document]:
    return [Document(id=str(i), text=f"{i}".ljust(length, "x")) for i in range(count)]


def test_a_small_corpus_is_taken_whole_and_in_order() -> None:
    assert reservoir(iter(documents(5)), size=9, seed=0) == ["0", "1", "2", "3", "4"]


def test_a_seed_gives_the_same_sample_and_another_seed_another() -> None:
    first, second, other = (reservoir(documents(500), size=50, seed=seed) for seed in (1, 1, 2))
    assert first == second
    assert first != other
    assert len(set(first)) == 50


def test_every_document_is_as_likely() -> None:
    counts = Counter(text for seed in range(600) for text in reservoir(documents(20), size=5, seed=seed))
    # 150 are expected of each, with a standard deviation of 10.6.
    assert len(counts) == 20
    assert all(100 < count < 200 for count in counts.values())


def test_long_documents_count_with_their_beginning() -> None:
    (text,) = reservoir(documents(1, length=MAX_CHARACTERS + 5), size=1, seed=0)
    assert len(text) == MAX_CHARACTERS


def test_the_sample_never_holds_more_characters_than_allowed() -> None:
    texts = reservoir(documents(300, length=1000), size=100, seed=0, max_total=10_000)
    assert len(texts) == 100
    assert sum(map(len, texts)) <= 10_000
    assert sum(map(len, texts)) > 4_000
