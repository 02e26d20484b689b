"""The second pass: which document goes where, and how shards are cut."""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from cbtm_common.errors import InvalidArgument
from cbtm_common.routing import CentroidRouter, TermEmbedding
from cbtm_common.shards import read_shard
from cbtm_coordinator.clustering import sharding as module
from cbtm_coordinator.clustering import spool
from cbtm_coordinator.clustering.corpus import Document
from cbtm_coordinator.clustering.progress import ClusterStats, ShardFile
from cbtm_coordinator.clustering.sharding import HELD_OUT, TRAIN, is_held_out, shard_corpus
from cbtm_coordinator.clustering.tokenizer import train_tokenizer

EOS = 0


class Words:
    """A tokenizer: "w17" is token 17, any other word is token 1."""

    eos_token_id = EOS

    def __init__(self) -> None:
        vocabulary = {"<end>": EOS, "?": 1} | {f"w{i}": i for i in range(2, 1000)}
        self.backend_tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
        self.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

    def __len__(self) -> int:
        return 1000


def make_router(clusters: int = 3) -> CentroidRouter:
    """Cluster i is that of the term "topic<i>"."""
    names = [f"topic{'abcdefgh'[i]}" for i in range(clusters)]
    eye = np.eye(clusters, dtype=np.float32)
    return CentroidRouter(
        cluster_ids=[f"r-c{i:04d}" for i in range(clusters)],
        embedding=TermEmbedding(names, eye),
        centroids=eye,
        prior=np.full(clusters, 1 / clusters, dtype=np.float32),
    )


def documents(count: int, clusters: int = 3) -> Iterator[Document]:
    """Document i is of cluster i mod K, and its tokens say which it is."""
    for i in range(count):
        yield Document(id=f"doc{i}", text=f"topic{'abcdefgh'[i % clusters]} w{i % 900 + 2} w{i // 900 + 2}")


def shard(tmp_path: Path, count: int, clusters: int = 3, **options: Any) -> tuple[list[ShardFile], list[ClusterStats]]:
    values: dict[str, Any] = {"held_out_fraction": 0.2, "router": make_router(clusters), **options}
    return shard_corpus([lambda: documents(count, clusters)], tokenizer=Words(), output=tmp_path / "shards", **values)


def contents(shards: list[ShardFile], **which: Any) -> list[list[int]]:
    found = []
    for file in shards:
        if all(getattr(file, name) == value for name, value in which.items()):
            found += [document.tolist() for document in read_shard(file.path).documents()]
    return found


def test_every_document_is_in_one_shard_of_its_own_cluster_and_split(tmp_path: Path) -> None:
    shards, stats = shard(tmp_path, 300)
    expected: dict[tuple[int, str], list[list[int]]] = defaultdict(list)
    for i, document in enumerate(documents(300)):
        split = HELD_OUT if is_held_out(document.id, 0.2) else TRAIN
        expected[i % 3, split].append([1, i % 900 + 2, i // 900 + 2])
    for (cluster, split), tokens in expected.items():
        assert contents(shards, cluster_index=cluster, split=split) == tokens
    assert [s.documents for s in stats] == [100, 100, 100]
    assert [s.tokens for s in stats] == [400, 400, 400]
    assert sum(s.tokens for s in shards) == 1200
    assert sum(s.documents for s in shards) == 300


def test_what_a_shard_says_of_itself_is_so(tmp_path: Path) -> None:
    shards, _ = shard(tmp_path, 100)
    for file in shards:
        opened = read_shard(file.path)
        assert (len(opened.tokens), len(opened.document_offsets)) == (file.tokens, file.documents)
        assert (opened.eos_token_id, opened.vocab_size) == (EOS, 1000)


def test_the_folder_holds_the_shards_and_nothing_else(tmp_path: Path) -> None:
    shards, _ = shard(tmp_path, 100)
    assert sorted(p.name for p in (tmp_path / "shards").iterdir()) == sorted(s.path.name for s in shards)


def test_the_same_corpus_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (shard(tmp_path / name, 200)[0] for name in "ab")
    assert [f.path.read_bytes() for f in first] == [f.path.read_bytes() for f in second]


def test_a_document_never_changes_sides() -> None:
    ids = [f"doc{i}" for i in range(4000)]
    held_out = {i for i in ids if is_held_out(i, 0.1)}
    assert 300 < len(held_out) < 500
    assert held_out == {i for i in reversed(ids) if is_held_out(i, 0.1)}
    # A larger share keeps what was held out, so that nothing that was judged on is ever trained on.
    assert held_out <= {i for i in ids if is_held_out(i, 0.2)}
    assert not any(is_held_out(i, 1e-9) for i in ids)


def test_pieces_of_one_document_are_on_one_side(tmp_path: Path) -> None:
    pieces = [Document(id=f"d{i // 4}", text=f"topica w{i + 2}") for i in range(80)]
    shards, _ = shard_corpus([lambda: pieces], make_router(1), Words(), tmp_path / "shards", held_out_fraction=0.3)
    sides = {(tokens[1] - 2) // 4 for tokens in contents(shards, split=HELD_OUT)}
    assert sides
    assert not sides & {(tokens[1] - 2) // 4 for tokens in contents(shards, split=TRAIN)}


def test_each_cluster_has_a_held_out_document_however_small_the_share(tmp_path: Path) -> None:
    shards, stats = shard(tmp_path, 30, held_out_fraction=1e-9)
    for cluster in range(3):
        (held_out,) = (s for s in shards if (s.cluster_index, s.split) == (cluster, HELD_OUT))
        assert held_out.documents == 1
        # The last of the cluster, and trained on no more.
        assert contents(shards, cluster_index=cluster, split=HELD_OUT) == [[1, 27 + cluster + 2, 2]]
        assert len(contents(shards, cluster_index=cluster, split=TRAIN)) == 9
    assert [s.documents for s in stats] == [10, 10, 10]


def test_the_only_document_of_a_cluster_is_trained_on(tmp_path: Path) -> None:
    shards, _ = shard(tmp_path, 3, held_out_fraction=1e-9)
    assert [(s.split, s.documents) for s in shards] == [(TRAIN, 1)] * 3


def test_shards_are_cut_between_documents_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Three documents of 4 uint16 tokens and an int64 offset each fit, a fourth does not.
    monkeypatch.setattr(module, "MAX_PAYLOAD_BYTES", 3 * 16 + 15)
    shards, _ = shard(tmp_path, 100, clusters=1)
    train = [s for s in shards if s.split == TRAIN]
    assert [s.ordinal for s in train] == list(range(len(train)))
    assert {s.documents for s in train[:-1]} == {3}
    monkeypatch.setattr(module, "MAX_PAYLOAD_BYTES", 10_000)
    whole, _ = shard(tmp_path / "whole", 100, clusters=1)
    assert contents(shards, split=TRAIN) == contents(whole, split=TRAIN)
    assert contents(shards, split=HELD_OUT) == contents(whole, split=HELD_OUT)


def test_a_document_that_fits_no_shard_is_named_as_the_trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PAYLOAD_BYTES", 12)
    with pytest.raises(InvalidArgument, match="corpus: a document of 4 tokens"):
        shard(tmp_path, 10)


def test_small_buffers_give_the_same_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once, _ = shard(tmp_path / "a", 300)
    monkeypatch.setattr(spool.Spools.__init__, "__kwdefaults__", {"buffer_bytes": 50})
    monkeypatch.setattr(module, "_BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(module, "_BATCH_CHARACTERS", 90)
    monkeypatch.setattr(module, "_LENGTHS_AT_A_TIME", 3)
    in_bits, _ = shard(tmp_path / "b", 300)
    assert [f.path.read_bytes() for f in at_once] == [f.path.read_bytes() for f in in_bits]


def test_documents_are_taken_from_the_corpus_a_batch_at_a_time(tmp_path: Path) -> None:
    taken = done = most = 0

    def counted() -> Iterator[Document]:
        nonlocal taken, most
        for document in documents(700):
            taken += 1
            most = max(most, taken - done)
            yield document

    def on_documents(count: int) -> None:
        nonlocal done
        done += count

    files = [counted]
    shard_corpus(files, make_router(), Words(), tmp_path / "a", held_out_fraction=0.1, on_documents=on_documents)
    assert done == taken == 700
    assert most <= 257


def test_examples_are_few_and_short(tmp_path: Path) -> None:
    long = [Document(id=str(i), text="topica " + "word " * 1000) for i in range(50)]
    _, (stats,) = shard_corpus([lambda: long], make_router(1), Words(), tmp_path / "shards", held_out_fraction=0.1)
    assert len(stats.examples) == 5
    assert all(len(example) == 400 for example in stats.examples)


def test_a_cluster_without_documents_has_no_shards(tmp_path: Path) -> None:
    shards, stats = shard(tmp_path, 20, clusters=1, router=make_router(3))
    assert {s.cluster_index for s in shards} == {0}
    assert [s.documents for s in stats] == [20, 0, 0]


class Killed(BaseException):
    """The process ended here."""


def killed_after(count: int, opened: list[int]) -> list[Callable[[], Iterator[Document]]]:
    """Three files of 50 documents, whose reading ends the process at document `count` of all; says which are opened."""

    def read(file: int) -> Iterator[Document]:
        opened.append(file)
        for i, document in enumerate(documents(150)):
            if i // 50 == file:
                if i == count:
                    raise Killed
                yield document

    return [partial(read, file) for file in range(3)]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("count", [0, 7, 49, 50, 101, 149])
def test_a_pass_that_was_killed_goes_on_without_the_finished_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(module, "_BATCH_DOCUMENTS", 5)
    monkeypatch.setattr(module, "_RECORD_CHARACTERS", 1)
    options: dict[str, Any] = {"router": make_router(), "tokenizer": Words(), "held_out_fraction": 0.2}
    calm = shard_corpus(killed_after(-1, []), output=tmp_path / "calm", **options)
    for _ in range(2):
        with pytest.raises(Killed):
            shard_corpus(killed_after(count, []), output=tmp_path / "shards", **options)
    # What was written after the last record counts for nothing.
    for spool_path in (tmp_path / "shards.progress").glob("*.spool"):
        spool_path.write_bytes(spool_path.read_bytes() + b"12345678")
    opened: list[int] = []
    told: list[int] = []
    files = killed_after(-1, opened)
    again = shard_corpus(files, output=tmp_path / "shards", on_documents=told.append, **options)
    assert opened == list(range(count // 50, 3))
    assert sum(told) == 150
    assert bytes_of(tmp_path / "shards") == bytes_of(tmp_path / "calm")
    assert again[1] == calm[1]
    assert [replace(s, path=Path()) for s in again[0]] == [replace(s, path=Path()) for s in calm[0]]


def test_a_pass_killed_while_packing_packs_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = shard(tmp_path / "calm", 90)
    write, written = module.write_shard, 0

    def dying(*given: Any, **options: Any) -> None:
        nonlocal written
        written += 1
        if written == 4:
            raise Killed
        write(*given, **options)

    monkeypatch.setattr(module, "write_shard", dying)
    with pytest.raises(Killed):
        shard(tmp_path, 90)
    again = shard(tmp_path, 90)
    # Two of each cluster, and of the second one the first was written twice.
    assert written == 8
    assert bytes_of(tmp_path / "shards") == bytes_of(tmp_path / "calm" / "shards")
    assert again[1] == calm[1]


def test_what_is_done_already_is_only_listed(tmp_path: Path) -> None:
    first = shard(tmp_path, 60)
    opened: list[int] = []
    options: dict[str, Any] = {"router": make_router(), "tokenizer": Words(), "held_out_fraction": 0.2}
    assert shard_corpus(killed_after(0, opened)[:1], output=tmp_path / "shards", **options) == first
    assert opened == []


@pytest.mark.parametrize(
    "changed",
    [{"inputs": "rewritten"}, {"held_out_fraction": 0.3}, {"router": make_router(4)}],
    ids=["files", "fraction", "router"],
)
def test_what_was_done_under_other_inputs_is_not_taken_for_these(tmp_path: Path, changed: dict[str, Any]) -> None:
    opened: list[int] = []
    options: dict[str, Any] = {"router": make_router(), "tokenizer": Words(), "held_out_fraction": 0.2, **changed}
    calm = shard_corpus(killed_after(-1, []), output=tmp_path / "calm", **options)
    shard(tmp_path, 70)
    again = shard_corpus(killed_after(-1, opened), output=tmp_path / "shards", **options)
    assert opened == [0, 1, 2]
    assert bytes_of(tmp_path / "shards") == bytes_of(tmp_path / "calm")
    assert again[1] == calm[1]


def test_the_shards_of_a_run_that_was_killed_serve_another_run_of_the_same_corpus(tmp_path: Path) -> None:
    first = shard(tmp_path, 60)
    other = make_router()
    other._cluster_ids = tuple(f"other-c{i:04d}" for i in range(3))
    opened: list[int] = []
    options: dict[str, Any] = {"router": other, "tokenizer": Words(), "held_out_fraction": 0.2}
    assert shard_corpus(killed_after(0, opened)[:1], output=tmp_path / "shards", **options) == first
    assert opened == []


def test_tokens_are_those_of_the_tokenizers_own_call(tmp_path: Path) -> None:
    texts = ["A ship at sea; ein Schiff 漢字", "it says <|endoftext|> and goes on", "", " \n"]
    tokenizer = train_tokenizer(texts[:1] * 9, tmp_path / "tokenizer", vocab_size=300, context=4)
    expected = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    assert pickle.loads(pickle.dumps(module._Encoder(tokenizer)))(texts) == expected
