"""The second pass: every document to its nearest cluster, held out or not by a hash of its id, tokenized, packed.

Token ids wait in spool files, one for each cluster and split, and are cut into shards at document boundaries. Memory
holds one batch of documents and one write buffer, whatever the corpus and K. Disk holds the corpus as token ids once,
and one cluster of it twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cbtm_common.errors import InvalidArgument
from cbtm_common.routing import CentroidRouter
from cbtm_common.shards import MAX_PAYLOAD_BYTES, token_dtype, write_shard
from cbtm_coordinator.clustering.corpus import Document
from cbtm_coordinator.clustering.spool import Spools

TRAIN, HELD_OUT = "TRAIN", "HELD_OUT"
# A batch is tokenized at once, at about a hundred bytes of memory a token.
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 4_000_000
_EXAMPLES = 5
_EXAMPLE_CHARACTERS = 400
_LENGTHS_AT_A_TIME = 1 << 16


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


def shard_corpus(
    documents: Iterable[Document],
    router: CentroidRouter,
    tokenizer: Any,
    output: Path,
    *,
    held_out_fraction: float,
    on_documents: Callable[[int], None] = lambda _: None,
) -> tuple[list[ShardFile], list[ClusterStats]]:
    """Writes all shards into `output`, a folder for them alone; their list, and statistics by cluster index."""
    vocab_size, eos = len(tokenizer), int(tokenizer.eos_token_id)
    output.mkdir(parents=True, exist_ok=True)
    spools = Spools(output, token_dtype(vocab_size))
    stats = [ClusterStats() for _ in router.cluster_ids]
    for batch in _batches(documents):
        texts = [document.text for document in batch]
        # What looks like a special token in a document is text: only packing ends a document.
        encoded = tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        for document, cluster, ids in zip(batch, router.assign(texts).tolist(), encoded, strict=True):
            split = HELD_OUT if is_held_out(document.id, held_out_fraction) else TRAIN
            spools.append((cluster, split), [*ids, eos])
            _note(stats[cluster], document, len(ids) + 1)
        on_documents(len(batch))
    spools.flush()
    shards: list[ShardFile] = []
    for cluster in range(len(stats)):
        train, held_out = (cluster, TRAIN), (cluster, HELD_OUT)
        if not spools.documents(held_out) and spools.documents(train) > 1:
            # Every cluster is judged on something, however small it is.
            spools.append(held_out, spools.take_last(train))
        for key in (train, held_out):
            tokens, lengths = spools.read(key)
            shards += _pack(tokens, lengths, output, cluster, key[1], vocab_size=vocab_size, eos=eos)
            del tokens, lengths
            spools.drop(key)
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
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _pack(
    tokens: npt.NDArray[Any],
    lengths: npt.NDArray[np.int64],
    output: Path,
    cluster: int,
    split: str,
    *,
    vocab_size: int,
    eos: int,
) -> list[ShardFile]:
    found: list[ShardFile] = []
    start = 0
    for first, end in _cuts(lengths, itemsize=tokens.dtype.itemsize):
        path = output / f"c{cluster:04d}-{split.lower()}-{len(found):05d}.safetensors"
        ends = np.cumsum(lengths[first:end])
        size = int(ends[-1])
        offsets = np.concatenate([[0], ends[:-1]]).astype(np.int64)
        write_shard(path, tokens[start : start + size], offsets, vocab_size=vocab_size, eos_token_id=eos)
        found.append(
            ShardFile(
                cluster_index=cluster,
                split=split,
                ordinal=len(found),
                path=path,
                tokens=size,
                documents=end - first,
            )
        )
        start += size
    return found


def _cuts(lengths: npt.NDArray[np.int64], *, itemsize: int) -> Iterator[tuple[int, int]]:
    """(first document, end) of each shard: as many documents as fit in it."""
    first, size, document = 0, 0, 0
    for begin in range(0, len(lengths), _LENGTHS_AT_A_TIME):
        for length in lengths[begin : begin + _LENGTHS_AT_A_TIME].tolist():
            need = length * itemsize + 8
            if need > MAX_PAYLOAD_BYTES:
                raise InvalidArgument(
                    f"corpus: a document of {length:,} tokens does not fit a shard; split it", field="corpus"
                )
            if size + need > MAX_PAYLOAD_BYTES:
                yield first, document
                first, size = document, 0
            size += need
            document += 1
    if size:
        yield first, document
