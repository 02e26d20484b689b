"""The one reader of safetensors headers, for files that a stranger may have made.

    8 bytes                  length of the header, little-endian
    header                   JSON: name -> {dtype, shape, data_offsets}; `__metadata__` -> strings
    payload                  the tensors

Source: https://github.com/huggingface/safetensors#format. Stricter than the library: tensors fill the payload one
after the other, each byte once; no name stands twice; names can be printed; sizes are bounded before anything is
allocated. Only the header is read here, and nothing is executed. Every fault is an IntegrityError that says where.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cbtm_common import strict_json
from cbtm_common.errors import IntegrityError

# Of header text: a model of 100,000 tensors takes about as much.
MAX_HEADER_BYTES = 16 << 20
PREFIX_BYTES = 8

_MAX_TENSORS = 200_000
_MAX_DIMENSIONS = 16
_MAX_NAME = 1024
_METADATA = "__metadata__"
_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
# Bytes of one number.
ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor: bytes `begin` to `end` of the payload."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def count(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class SafetensorsHeader:
    """`tensors` in the order of their bytes; the payload starts at byte `payload` of the file."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    payload: int


def header_bytes(prefix: bytes, *, file_bytes: int, limit: int = MAX_HEADER_BYTES, where: object = "file") -> int:
    """Length of the header text, from the first 8 bytes of a file of `file_bytes`.

    Raises IntegrityError when it is over `limit`, or more than the file holds.
    """
    if len(prefix) != PREFIX_BYTES:
        _fail(where, f"{file_bytes} bytes are no safetensors file")
    (length,) = struct.unpack("<Q", prefix)
    if length > limit:
        _fail(where, f"a header of {length} bytes is too large: at most {limit} are read")
    if length > file_bytes - PREFIX_BYTES:
        _fail(where, f"a header of {length} bytes does not fit a file of {file_bytes}")
    return int(length)


def parse_header(text: bytes, *, file_bytes: int, where: object = "file") -> SafetensorsHeader:
    """The header whose JSON is `text`, of a file of `file_bytes` in all. Raises IntegrityError."""
    try:
        header = strict_json.loads(text)
    except ValueError as error:
        raise IntegrityError(f"{where}: its safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict):
        _fail(where, "its safetensors header is not an object")
    metadata = header.pop(_METADATA, {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        _fail(where, f"{_METADATA} of its safetensors header does not hold strings alone")
    if len(header) > _MAX_TENSORS:
        _fail(where, f"{len(header)} tensors are more than {_MAX_TENSORS}")
    tensors = {name: _entry(where, name, given) for name, given in header.items()}
    ordered = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    at, payload = 0, PREFIX_BYTES + len(text)
    for name, entry in ordered.items():
        if entry.begin != at:
            fault = "overlaps the tensor before it" if entry.begin < at else "leaves a gap before it"
            _fail(where, f"tensor {name!r} at bytes {entry.begin} to {entry.end} {fault}, which ends at {at}")
        at = entry.end
    if at != file_bytes - payload:
        _fail(where, f"its tensors take {at} bytes, its payload has {file_bytes - payload}")
    return SafetensorsHeader(tensors=ordered, metadata=metadata, payload=payload)


def read_header(path: Path, *, limit: int = MAX_HEADER_BYTES) -> SafetensorsHeader:
    """The header of a file on this disk. Raises IntegrityError when it is no safetensors file, OSError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = header_bytes(file.read(PREFIX_BYTES), file_bytes=size, limit=limit, where=path)
        text = file.read(length)
    if len(text) != length:
        _fail(path, f"its header ends after {len(text)} of {length} bytes")
    return parse_header(text, file_bytes=size, where=path)


def _entry(where: object, name: str, given: Any) -> TensorEntry:
    if not name or len(name) > _MAX_NAME or not name.isprintable():
        _fail(where, f"a tensor is named {name[:80]!r}; 1 to {_MAX_NAME} printable characters are a name")
    if not isinstance(given, dict) or given.keys() != _FIELDS:
        _fail(where, f"tensor {name!r} has not exactly the fields dtype, shape and data_offsets")
    dtype, shape, offsets = given["dtype"], given["shape"], given["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        _fail(where, f"tensor {name!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not _is_lengths(shape) or len(shape) > _MAX_DIMENSIONS:
        _fail(where, f"tensor {name!r} has no shape of at most {_MAX_DIMENSIONS} whole numbers")
    if not _is_lengths(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _fail(where, f"tensor {name!r} has data_offsets that are no beginning and end")
    entry = TensorEntry(dtype, tuple(shape), *offsets)
    if entry.count * ITEM_BYTES[dtype] != entry.end - entry.begin:
        _fail(where, f"tensor {name!r} of {dtype} {list(shape)} does not take {entry.end - entry.begin} bytes")
    return entry


def _is_lengths(value: Any) -> bool:
    """Whether it is a list of integers from 0 to 2^63 - 1; JSON's true is an int to Python."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _fail(where: object, what: str) -> NoReturn:
    raise IntegrityError(f"{where}: {what}")
