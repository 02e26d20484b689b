"""Token shards: packed token ids with document boundaries, as safetensors.

| tensor | dtype | shape | meaning |
| --- | --- | --- | --- |
| `tokens` | uint16, or uint32 when the vocabulary needs it | [N] | documents one after the other, each ended by EOS |
| `document_offsets` | int64 | [D] | where each document starts; ascending from 0 |

Metadata: `format` = cbtm-shard-1, `eos_token_id`, `vocab_size`. At most 64 MiB. Reading maps the file into memory and
checks everything that a reader relies on: header, offsets, range of ids. Only numpy is needed; nothing is executed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cbtm_common.errors import IntegrityError
from cbtm_common.safetensors_header import SafetensorsHeader, read_header

FORMAT = "cbtm-shard-1"
MAX_SHARD_BYTES = 64 * 1024 * 1024
# Room for the header, so that a shard of this many bytes of tokens and offsets stays under the limit.
MAX_PAYLOAD_BYTES = MAX_SHARD_BYTES - 4096

_MAX_HEADER_BYTES = 1 << 16
_DTYPES: dict[str, np.dtype[Any]] = {"U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "I64": np.dtype("<i8")}


@dataclass(frozen=True, kw_only=True)
class TokenShard:
    """An opened shard. `tokens` [N] and `document_offsets` [D] are views of the mapped file."""

    tokens: npt.NDArray[Any]
    document_offsets: npt.NDArray[np.int64]
    eos_token_id: int
    vocab_size: int

    def documents(self) -> Iterator[npt.NDArray[np.int64]]:
        """Token ids of each document, its EOS left out."""
        ends = [*self.document_offsets[1:].tolist(), len(self.tokens)]
        for start, end in zip(self.document_offsets.tolist(), ends, strict=True):
            yield self.tokens[start : end - 1].astype(np.int64)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 where every id fits it, else uint32."""
    return np.dtype(np.uint16) if vocab_size <= 1 << 16 else np.dtype(np.uint32)


def write_shard(
    path: Path,
    tokens: npt.NDArray[Any],
    document_offsets: npt.NDArray[Any],
    *,
    vocab_size: int,
    eos_token_id: int,
) -> None:
    """Writes one shard. `tokens` [N] ends with EOS; `document_offsets` [D] ascends from 0.

    Equal arguments give equal bytes, as shards are named by their digest; safetensors' own writer orders metadata by
    chance.
    """
    offsets = np.ascontiguousarray(document_offsets, dtype=_DTYPES["I64"])
    kind = "U16" if token_dtype(vocab_size).itemsize == 2 else "U32"
    packed = np.ascontiguousarray(tokens, dtype=_DTYPES[kind])
    end = offsets.nbytes + packed.nbytes
    header = {
        "__metadata__": {"format": FORMAT, "eos_token_id": str(eos_token_id), "vocab_size": str(vocab_size)},
        "document_offsets": {"dtype": "I64", "shape": [len(offsets)], "data_offsets": [0, offsets.nbytes]},
        "tokens": {"dtype": kind, "shape": [len(packed)], "data_offsets": [offsets.nbytes, end]},
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    # Tensors begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.write(offsets.data)
        file.write(packed.data)


def read_shard(path: Path) -> TokenShard:
    """Maps and checks a shard. Raises IntegrityError, saying what is wrong with the file."""
    size = path.stat().st_size
    if size > MAX_SHARD_BYTES:
        raise IntegrityError(f"{path}: a token shard of {size} bytes is over the limit of {MAX_SHARD_BYTES}")
    header = read_header(path, limit=_MAX_HEADER_BYTES)
    metadata = header.metadata
    if metadata.get("format") != FORMAT:
        raise IntegrityError(f"{path}: format is {metadata.get('format')!r}, not {FORMAT!r}")
    if set(header.tensors) != {"tokens", "document_offsets"}:
        raise IntegrityError(f"{path}: holds {sorted(header.tensors)[:8]}, not tokens and document_offsets")
    tokens = _tensor(path, header, "tokens", ("U16", "U32"))
    offsets = _tensor(path, header, "document_offsets", ("I64",))
    vocab_size, eos = (_whole_number(path, metadata, name) for name in ("vocab_size", "eos_token_id"))
    _check(path, tokens, offsets, vocab_size=vocab_size, eos=eos)
    return TokenShard(tokens=tokens, document_offsets=offsets, eos_token_id=eos, vocab_size=vocab_size)


def _whole_number(path: Path, metadata: Mapping[str, str], name: str) -> int:
    text = metadata.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        raise IntegrityError(f"{path}: {name} is {text[:40]!r}, not a whole number")
    return int(text)


def _tensor(path: Path, header: SafetensorsHeader, name: str, dtypes: Sequence[str]) -> npt.NDArray[Any]:
    entry = header.tensors[name]
    if entry.dtype not in dtypes or len(entry.shape) != 1:
        raise IntegrityError(
            f"{path}: {name} is {entry.dtype} {list(entry.shape)}, not one dimension of {' or '.join(dtypes)}"
        )
    dtype = _DTYPES[entry.dtype]
    if entry.count == 0:
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=header.payload + entry.begin, shape=entry.shape)


def _check(path: Path, tokens: npt.NDArray[Any], offsets: npt.NDArray[np.int64], *, vocab_size: int, eos: int) -> None:
    if len(tokens) == 0 or len(offsets) == 0 or offsets[0] != 0:
        raise IntegrityError(f"{path}: is empty, or its first document does not start at 0")
    ends = np.append(offsets[1:], len(tokens))
    # Compared, not subtracted: the difference of two offsets may overflow.
    if not (ends > offsets).all():
        raise IntegrityError(f"{path}: document_offsets do not ascend within the tokens")
    if int(tokens.max()) >= vocab_size:
        raise IntegrityError(f"{path}: token id {int(tokens.max())} is outside a vocabulary of {vocab_size}")
    if not (tokens[ends - 1] == eos).all():
        raise IntegrityError(f"{path}: a document does not end with token {eos}")
