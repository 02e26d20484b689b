"""The second pass: every document to its nearest cluster, held out or not by a hash of its id, tokenized, packed.

Batches of documents go to an engine and come back in order, so the shards are the same bytes whatever the engine. Token
ids wait in spool files, one for each cluster and split, and are cut into shards at document boundaries. Memory holds a
few batches for each process and one write buffer, whatever the corpus and K. Disk holds the corpus as token ids once,
and one cluster of it twice. A pass that was killed goes on where it was: finished files are not opened again, and of
the one it was in at most the last batches are done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from cbtm_common.errors import InvalidArgument
from cbtm_common.routing import Router
from cbtm_common.routing.router import JSON_NAME
from cbtm_common.shards import MAX_PAYLOAD_BYTES, token_dtype, write_shard
from cbtm_coordinator.clustering.corpus import Document
from cbtm_coordinator.clustering.engine import ONE_PROCESS, Engine
from cbtm_coordinator.clustering.progress import ClusterStats, Position, Progress, ShardFile
from cbtm_coordinator.clustering.spool import Key, Spools

TRAIN, HELD_OUT = "TRAIN", "HELD_OUT"
# A batch is tokenized at once, at about a hundred bytes of memory a token.
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 4_000_000
# The pass records how far it is after so many characters.
_RECORD_CHARACTERS = 16_000_000
# An engine may read so many parts of a corpus at once; of many small files, each has several.
_MOST_SPANS = 1024
_EXAMPLES = 5
_EXAMPLE_CHARACTERS = 400
_LENGTHS_AT_A_TIME = 1 << 16

# The documents of file i, from the first on. Called anew it gives the same.
Files = Sequence[Callable[[], Iterable[Document]]]


def shard_corpus(
    files: Files,
    router: Router,
    tokenizer: Any,
    output: Path,
    *,
    held_out_fraction: float,
    inputs: str = "",
    engine: Engine = ONE_PROCESS,
    on_documents: Callable[[int], None] = lambda _: None,
) -> tuple[list[ShardFile], list[ClusterStats]]:
    """Writes all shards into `output`, a folder for them alone; their list, and statistics by cluster index.

    `tokenizer` is a fast one of transformers, with an EOS token. Beside `output` a folder `<output>.progress` keeps
    what a later call with the same arguments goes on from, and which is the caller's to delete. `inputs` says what
    state the files are in: under another, or another router or tokenizer, it begins anew.
    """
    folder = output.with_name(f"{output.name}.progress")
    encoder = _Encoder(tokenizer)
    progress = Progress(folder, output, _digest(inputs, router, encoder, held_out_fraction))
    begun = progress.position()
    vocab_size, eos = len(tokenizer), int(tokenizer.eos_token_id)
    at = begun or Position(file=0, document=0, sizes={}, stats=[ClusterStats() for _ in router.cluster_ids])
    spools = Spools(folder, token_dtype(vocab_size), sizes=at.sizes)
    if begun is not None:
        on_documents(begun.documents)
    sharder = _Sharder(router, encoder, held_out_fraction, eos, token_dtype(vocab_size))
    stats = list(at.stats)
    since = 0
    for batch in engine.map(sharder, _spans(len(files), at.file, at.document), partial(_batches, files)):
        for key, found in batch.found.items():
            spools.extend(key, found.tokens, found.lengths)
        _note(stats, batch)
        on_documents(batch.documents)
        since += batch.characters
        if since >= _RECORD_CHARACTERS:
            progress.reach(Position(file=batch.file, document=batch.next, sizes=spools.flush(), stats=stats))
            since = 0
    progress.reach(Position(file=len(files), document=0, sizes=spools.flush(), stats=stats))
    shards: list[ShardFile] = []
    for cluster in range(len(stats)):
        packed = progress.packed(cluster)
        if packed is None:
            packed = _pack_cluster(spools, cluster, output, vocab_size=vocab_size, eos=eos)
            progress.pack(cluster, packed)
        for split in (TRAIN, HELD_OUT):
            spools.drop((cluster, split))
        shards += packed
    return shards, stats


def is_held_out(document_id: str, fraction: float) -> bool:
    """Whether a document is held out: a function of its id alone, so that it never changes sides."""
    digest = hashlib.sha256(b"held-out\0" + document_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2.0**64


@dataclass(frozen=True, kw_only=True)
class _Span:
    """Files from `file` to before `end`, of the first only what begins at document `document`."""

    file: int
    document: int
    end: int


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """Documents of one or more files; those that follow begin at document `next` of file `file`."""

    documents: list[Document]
    file: int
    next: int


@dataclass(frozen=True, kw_only=True)
class _Found:
    """Documents of one (cluster, split), each ended by EOS."""

    tokens: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class _Sharded:
    """A batch, done. `examples`: beginnings of its first documents, by cluster."""

    found: dict[Key, _Found]
    examples: dict[int, list[str]]
    documents: int
    characters: int
    file: int
    next: int


class _Encoder:
    """Texts to token ids, as the tokenizer's own call gives them, by its core alone: workers need no transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self.saved: str = tokenizer.backend_tokenizer.to_str()
        self._core: Any = None

    def __call__(self, texts: list[str]) -> list[list[int]]:
        if self._core is None:
            self._core = self._load()
        return [encoding.ids for encoding in self._core.encode_batch_fast(texts, add_special_tokens=False)]

    def __getstate__(self) -> dict[str, Any]:
        return {"saved": self.saved, "_core": None}

    def _load(self) -> Any:
        from tokenizers import Tokenizer

        core = Tokenizer.from_str(self.saved)
        core.no_truncation()
        core.no_padding()
        # What looks like a special token in a document is text: only packing ends a document.
        core.encode_special_tokens = True
        return core


@dataclass(frozen=True)
class _Sharder:
    """What is done to a batch, in any process."""

    router: Router
    encode: _Encoder
    held_out_fraction: float
    eos: int
    dtype: np.dtype[Any]

    def __call__(self, batch: _Batch) -> _Sharded:
        texts = [document.text for document in batch.documents]
        parts: dict[Key, list[npt.NDArray[Any]]] = {}
        examples: dict[int, list[str]] = {}
        clusters = self.router.assign(texts).tolist()
        for document, cluster, ids in zip(batch.documents, clusters, self.encode(texts), strict=True):
            split = HELD_OUT if is_held_out(document.id, self.held_out_fraction) else TRAIN
            parts.setdefault((cluster, split), []).append(np.array([*ids, self.eos], dtype=self.dtype))
            shown = examples.setdefault(cluster, [])
            if len(shown) < _EXAMPLES:
                shown.append(document.text[:_EXAMPLE_CHARACTERS])
        return _Sharded(
            found={
                key: _Found(tokens=np.concatenate(rows), lengths=np.array([len(row) for row in rows], dtype=np.int64))
                for key, rows in parts.items()
            },
            examples=examples,
            documents=len(texts),
            characters=sum(map(len, texts)),
            file=batch.file,
            next=batch.next,
        )


def _digest(inputs: str, router: Router, encoder: _Encoder, held_out_fraction: float) -> str:
    """Of all that decides what the shards hold; which run's clusters they are, does not."""
    digest = hashlib.sha256(json.dumps([inputs, held_out_fraction, encoder.saved]).encode())
    with TemporaryDirectory() as scratch:
        router.save(Path(scratch))
        for path in sorted(Path(scratch).iterdir()):
            data = path.read_bytes()
            if path.name == JSON_NAME:
                about = json.loads(data)
                about["cluster_ids"] = len(about["cluster_ids"])
                data = json.dumps(about).encode()
            digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def _note(stats: Sequence[ClusterStats], batch: _Sharded) -> None:
    for (cluster, _), found in batch.found.items():
        stats[cluster].documents += len(found.lengths)
        stats[cluster].tokens += len(found.tokens)
    for cluster, examples in batch.examples.items():
        stats[cluster].examples += examples[: _EXAMPLES - len(stats[cluster].examples)]


def _spans(files: int, first: int, document: int) -> list[_Span]:
    """All from `document` of file `first` on, in spans of about as many files each."""
    size = max(1, -(-(files - first) // _MOST_SPANS))
    return [
        _Span(file=begin, document=document if begin == first else 0, end=min(begin + size, files))
        for begin in range(first, files, size)
    ]


def _batches(files: Files, span: _Span) -> Iterator[_Batch]:
    """All documents of a span. A batch that ends with a file says so."""
    batch: list[Document] = []
    characters = 0

    def is_full() -> bool:
        return len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS

    for file in range(span.file, span.end):
        skipped = span.document if file == span.file else 0
        for position, found in enumerate(islice(files[file](), skipped, None), skipped):
            if is_full():
                yield _Batch(documents=batch, file=file, next=position)
                batch, characters = [], 0
            batch.append(found)
            characters += len(found.text)
        if is_full():
            yield _Batch(documents=batch, file=file + 1, next=0)
            batch, characters = [], 0
    if batch:
        yield _Batch(documents=batch, file=span.end, next=0)


def _pack_cluster(spools: Spools, cluster: int, output: Path, *, vocab_size: int, eos: int) -> list[ShardFile]:
    found = {split: spools.read((cluster, split)) for split in (TRAIN, HELD_OUT)}
    tokens, lengths = found[TRAIN]
    if not len(found[HELD_OUT][1]) and len(lengths) > 1:
        # Every cluster is judged on something, however small it is: its last document.
        end = len(tokens) - int(lengths[-1])
        found = {TRAIN: (tokens[:end], lengths[:-1]), HELD_OUT: (tokens[end:], lengths[-1:])}
    shards: list[ShardFile] = []
    for split, (tokens, lengths) in found.items():
        shards += _pack(tokens, lengths, output, cluster, split, vocab_size=vocab_size, eos=eos)
    return shards


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
