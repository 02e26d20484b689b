"""The second pass: every document to its nearest cluster, held out or not by a hash of its id, tokenized, packed.

Token ids are appended to spool files, one for each cluster and split, then cut into shards at document boundaries.
Memory holds one batch of documents and small write buffers, whatever the corpus and K.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cbtm_common.routing import CentroidRouter
from cbtm_common.shards import MAX_PAYLOAD_BYTES, token_dtype, write_shard
from cbtm_coordinator.clustering.corpus import Document

TRAIN, HELD_OUT = "TRAIN", "HELD_OUT"
_BATCH = 256
_BUFFER_TOKENS = 1 << 16
_EXAMPLES = 5
_EXAMPLE_CHARACTERS = 400


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One packed shard on disk."""

    cluster_index: int
    split: str
    ordinal: int
    path: Path
    tokens: int
    documents: int


@dataclass(kw_only=True)
class ClusterStats:
    """What the pass saw of one cluster."""

    documents: int = 0
    tokens: int = 0
    examples: list[str] = field(default_factory=list)


class Spool:
    """Tokens of one cluster and split on their way to shards: an append-only file and document lengths."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self._path = path
        self._dtype = dtype
        self._buffer: list[npt.NDArray[Any]] = []
        self._buffered = 0
        self.lengths: list[int] = []

    def append(self, ids: list[int]) -> None:
        self._buffer.append(np.asarray(ids, dtype=self._dtype))
        self._buffered += len(ids)
        self.lengths.append(len(ids))
        if self._buffered >= _BUFFER_TOKENS:
            self.flush()

    def flush(self) -> None:
        if self._buffer:
            # Opened for each flush: with K = 1,024 there are more spools than file descriptors.
            with self._path.open("ab") as file:
                for ids in self._buffer:
                    ids.tofile(file)
            self._buffer, self._buffered = [], 0

    def take_last(self) -> list[int]:
        """Removes the last document and returns its ids."""
        self.flush()
        ids = self.read()[-self.lengths[-1] :].tolist()
        size = (sum(self.lengths) - len(ids)) * self._dtype.itemsize
        with self._path.open("r+b") as file:
            file.truncate(size)
        self.lengths.pop()
        return [int(i) for i in ids]

    def read(self) -> npt.NDArray[Any]:
        self.flush()
        if not self.lengths:
            return np.zeros(0, dtype=self._dtype)
        return np.memmap(self._path, dtype=self._dtype, mode="r")


def shard_corpus(
    documents: Iterable[Document],
    router: CentroidRouter,
    tokenizer: Any,
    output: Path,
    *,
    held_out_fraction: float,
    on_documents: Callable[[int], None] = lambda _: None,
) -> tuple[list[ShardFile], list[ClusterStats]]:
    """Writes all shards under `output`; their list, and statistics by cluster index."""
    vocab_size, eos = len(tokenizer), int(tokenizer.eos_token_id)
    output.mkdir(parents=True, exist_ok=True)
    dtype = token_dtype(vocab_size)
    count = len(router.cluster_ids)
    spools = {
        (cluster, split): Spool(output / f"c{cluster:04d}.{split.lower()}.spool", dtype)
        for cluster in range(count)
        for split in (TRAIN, HELD_OUT)
    }
    stats = [ClusterStats() for _ in range(count)]
    for batch in _batches(documents):
        texts = [document.text for document in batch]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for document, cluster, ids in zip(batch, router.assign(texts).tolist(), encoded, strict=True):
            split = HELD_OUT if is_held_out(document.id, held_out_fraction) else TRAIN
            spools[cluster, split].append([*ids, eos])
            _note(stats[cluster], document, len(ids) + 1)
        on_documents(len(batch))
    shards: list[ShardFile] = []
    for cluster in range(count):
        train, held_out = spools[cluster, TRAIN], spools[cluster, HELD_OUT]
        if not held_out.lengths and len(train.lengths) > 1:
            # Every cluster is judged on something, however small it is.
            held_out.append(train.take_last())
        for split, spool in ((TRAIN, train), (HELD_OUT, held_out)):
            shards += _pack(spool, output, cluster, split, vocab_size=vocab_size, eos=eos)
    for path in output.glob("*.spool"):
        path.unlink()
    return shards, stats


def is_held_out(document_id: str, fraction: float) -> bool:
    """Whether a document is held out: a function of its id alone, so that it never changes sides."""
    digest = hashlib.sha256(b"held-out\0" + document_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


def _note(stats: ClusterStats, document: Document, tokens: int) -> None:
    stats.documents += 1
    stats.tokens += tokens
    if len(stats.examples) < _EXAMPLES:
        stats.examples.append(document.text[:_EXAMPLE_CHARACTERS])


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    source = iter(documents)
    while batch := list(islice(source, _BATCH)):
        yield batch


def _pack(spool: Spool, output: Path, cluster: int, split: str, *, vocab_size: int, eos: int) -> list[ShardFile]:
    tokens = spool.read()
    found: list[ShardFile] = []
    for start, lengths in _cuts(spool.lengths, itemsize=tokens.dtype.itemsize):
        path = output / f"c{cluster:04d}-{split.lower()}-{len(found):05d}.safetensors"
        offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
        size = sum(lengths)
        write_shard(path, tokens[start : start + size], offsets, vocab_size=vocab_size, eos_token_id=eos)
        found.append(
            ShardFile(
                cluster_index=cluster,
                split=split,
                ordinal=len(found),
                path=path,
                tokens=size,
                documents=len(lengths),
            )
        )
    return found


def _cuts(lengths: list[int], *, itemsize: int) -> Iterator[tuple[int, list[int]]]:
    """(first token, document lengths) of each shard: as many documents as fit in it."""
    start, size, current = 0, 0, list[int]()
    for length in lengths:
        need = length * itemsize + 8
        if need > MAX_PAYLOAD_BYTES:
            raise ValueError(f"a document of {length} tokens does not fit a shard")
        if size + need > MAX_PAYLOAD_BYTES:
            yield start, current
            start, size, current = start + sum(current), 0, []
        current.append(length)
        size += need
    if current:
        yield start, current
