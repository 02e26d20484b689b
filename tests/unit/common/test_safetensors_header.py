"""Safetensors headers made by strangers: what the library writes is read, and every trick is refused by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from cbtm_common.errors import IntegrityError
from cbtm_common.safetensors_header import TensorEntry, header_bytes, parse_header, read_header

_FOUR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
_NEXT = {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}


def refused(header: Any, payload: int, match: str) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with pytest.raises(IntegrityError, match=match):
        parse_header(text, file_bytes=8 + len(text) + payload)


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {"b": np.ones((2, 3), np.float32), "a": np.zeros((), np.int64), "none": np.zeros((0, 4), np.float16)}
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()} == {
        "a": ("I64", ()),
        "b": ("F32", (2, 3)),
        "none": ("F16", (0, 4)),
    }
    data = path.read_bytes()
    entry = header.tensors["b"]
    assert data[header.payload + entry.begin : header.payload + entry.end] == tensors["b"].tobytes()
    assert list(header.tensors.values()) == sorted(header.tensors.values(), key=lambda e: e.begin)


def test_an_entry_counts_its_numbers() -> None:
    assert TensorEntry("F32", (3, 4), 0, 48).count == 12
    assert TensorEntry("F32", (), 0, 4).count == 1


def test_a_header_larger_than_its_limit_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    data = save({"a": np.ones(1, np.float32)})
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="too large"):
        read_header(path, limit=8)
    with pytest.raises(IntegrityError, match="too large"):
        header_bytes(struct.pack("<Q", 1 << 62), file_bytes=1 << 63)
    with pytest.raises(IntegrityError, match="does not fit"):
        header_bytes(struct.pack("<Q", 1000), file_bytes=1007)
    path.write_bytes(data[:5])
    with pytest.raises(IntegrityError, match="5 bytes are no safetensors"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "payload", "match"),
    [
        ({"a": _FOUR, "b": {**_NEXT, "data_offsets": [2, 6]}}, 6, "overlaps"),
        ({"a": _FOUR, "b": {**_NEXT, "data_offsets": [0, 4]}}, 4, "overlaps"),
        ({"a": _FOUR, "b": {**_NEXT, "data_offsets": [6, 10]}}, 10, "gap"),
        ({"a": _NEXT}, 8, "gap"),
        ({"a": _FOUR}, 5, "payload has 5"),
        ({"a": _FOUR}, 3, "payload has 3"),
        ({"a": {**_FOUR, "shape": [2]}}, 4, "does not take 4 bytes"),
        ({"a": {**_FOUR, "shape": [1 << 40, 1 << 40]}}, 4, "does not take 4 bytes"),
        ({"a": {**_FOUR, "shape": [-1]}}, 4, "whole numbers"),
        ({"a": {**_FOUR, "shape": [True]}}, 4, "whole numbers"),
        ({"a": {**_FOUR, "shape": [1.0]}}, 4, "whole numbers"),
        ({"a": {**_FOUR, "shape": [1] * 17}}, 4, "at most 16"),
        ({"a": {**_FOUR, "data_offsets": [4, 0]}}, 4, "beginning and end"),
        ({"a": {**_FOUR, "data_offsets": [0, 1 << 70]}}, 4, "beginning and end"),
        ({"a": {**_FOUR, "dtype": "OBJ"}}, 4, "unknown dtype"),
        ({"a": {**_FOUR, "dtype": ["F32"]}}, 4, "unknown dtype"),
        ({"a": {**_FOUR, "more": 1}}, 4, "exactly the fields"),
        ({"a": 4}, 4, "exactly the fields"),
        ({"": _FOUR}, 4, "is named"),
        ({"a\n": _FOUR}, 4, "is named"),
        ({"a" * 1025: _FOUR}, 4, "is named"),
        ({"__metadata__": {"a": 1}}, 0, "strings alone"),
        ([], 0, "not an object"),
        (b'{"a": NaN}', 0, "NaN is no JSON"),
        (b'{"a": {}, "a": {}}', 0, "twice"),
        (b'{"__metadata__": {"a": "1", "a": "2"}}', 0, "twice"),
        (b"[" * 100_000, 0, "not JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", 0, "not JSON"),
        (b"\x80\x04\x95", 0, "not JSON"),
        (b'{"\\ud800": 1}', 0, "is named"),
    ],
)
def test_headers_of_strangers_are_refused(header: Any, payload: int, match: str) -> None:
    refused(header, payload, match)
