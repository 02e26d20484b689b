"""Token shards: what is written is read back, and nothing malformed is."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from cbtm_common import shards
from cbtm_common.errors import IntegrityError
from cbtm_common.shards import read_shard, token_dtype, write_shard

EOS = 0
# Two documents: 5 6 7, and 8.
TOKENS = np.array([5, 6, 7, EOS, 8, EOS], dtype=np.uint16)
OFFSETS = np.array([0, 4], dtype=np.int64)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("shard") / "good.safetensors"
    write_shard(path, TOKENS, OFFSETS, vocab_size=10, eos_token_id=EOS)
    return path.read_bytes()


def layout(good: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", good[:8])
    return json.loads(good[8 : 8 + length]), good[8 + length :]


def built(header: Any, payload: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def refused(data: bytes, match: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bad.safetensors"
        path.write_bytes(data)
        with pytest.raises(IntegrityError, match=match):
            read_shard(path)


@given(
    documents=st.lists(st.lists(st.integers(1, 70_000), max_size=8), min_size=1, max_size=6),
    vocab_size=st.sampled_from([70_001, 1 << 17]),
)
@settings(max_examples=15, deadline=None)
def test_documents_come_back_as_they_went(documents: list[list[int]], vocab_size: int) -> None:
    tokens = np.array([i for document in documents for i in (*document, EOS)])
    offsets = np.cumsum([0, *(len(document) + 1 for document in documents[:-1])])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        write_shard(path, tokens, offsets, vocab_size=vocab_size, eos_token_id=EOS)
        shard = read_shard(path)
        assert [document.tolist() for document in shard.documents()] == documents
        assert (shard.eos_token_id, shard.vocab_size) == (EOS, vocab_size)


def test_it_is_a_safetensors_file_and_the_same_one_each_time(tmp_path: Path, good: bytes) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / name, TOKENS, OFFSETS, vocab_size=10, eos_token_id=EOS)
        assert (tmp_path / name).read_bytes() == good
    with safe_open(str(tmp_path / "a"), framework="numpy") as opened:
        assert opened.metadata() == {"format": "cbtm-shard-1", "eos_token_id": "0", "vocab_size": "10"}
        np.testing.assert_array_equal(opened.get_tensor("tokens"), TOKENS)
        np.testing.assert_array_equal(opened.get_tensor("document_offsets"), OFFSETS)


@pytest.mark.parametrize(("vocab_size", "expected"), [(257, "uint16"), (65_536, "uint16"), (65_537, "uint32")])
def test_token_ids_take_the_smaller_type_that_holds_them(vocab_size: int, expected: str) -> None:
    assert token_dtype(vocab_size) == np.dtype(expected)


def test_the_tokens_stay_on_disk_until_they_are_used(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(good)
    assert isinstance(read_shard(path).tokens, np.memmap)


def test_a_shard_over_the_limit_is_refused_unread(good: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_SHARD_BYTES", len(good) - 1)
    refused(good, "over the limit")


def test_any_truncation_is_refused(good: bytes) -> None:
    for size in range(0, len(good), 7):
        refused(good[:size])


def test_bytes_after_the_end_are_refused(good: bytes) -> None:
    refused(good + b"\0\0", "payload")


@pytest.mark.parametrize(
    ("tokens", "offsets", "match"),
    [
        ([5, EOS, 8, 9], [0, 2], "does not end"),
        ([5, 6, EOS, 9], [0, 2], "does not end"),
        ([5, 10, EOS], [0], "outside a vocabulary"),
        ([5, EOS, 6, EOS], [0, 0], "ascend"),
        ([5, EOS, 6, EOS], [2, 0], "first document"),
        ([5, EOS, 6, EOS], [1, 2], "first document"),
        ([5, EOS, 6, EOS], [0, 4], "ascend"),
        ([5, EOS, 6, EOS], [0, 9], "ascend"),
        ([5, EOS, 6, EOS], [0, -1], "ascend"),
        ([5, EOS, 6, EOS], [0, 2**62], "ascend"),
        ([5, EOS, 6, EOS], [0, 2**63 - 1, -2], "ascend"),
        ([5, EOS], [], "empty"),
        ([], [0], "empty"),
    ],
)
def test_documents_that_are_none_are_refused(tmp_path: Path, tokens: list[int], offsets: list[int], match: str) -> None:
    path = tmp_path / "a.safetensors"
    write_shard(path, np.array(tokens, dtype=np.int64), np.array(offsets), vocab_size=10, eos_token_id=EOS)
    refused(path.read_bytes(), match)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"1",
        b'"tokens"',
        b"\xff\xfe",
        b"[" * 60_000,
        b'{"__metadata__": null}',
        b'{"__metadata__": {"format": "cbtm-shard-1"}}',
    ],
)
def test_headers_that_are_none_are_refused(header: bytes) -> None:
    refused(built(header, b"\0" * 32))


def test_a_header_longer_than_the_file_is_refused() -> None:
    refused(struct.pack("<Q", 2**63) + b"{}")


@pytest.mark.parametrize("name", ["tokens", "document_offsets", "__metadata__"])
def test_a_missing_part_is_refused(good: bytes, name: str) -> None:
    header, payload = layout(good)
    del header[name]
    refused(built(header, payload))


def test_another_tensor_is_refused(good: bytes) -> None:
    header, payload = layout(good)
    end = len(payload)
    header["more"] = {"dtype": "U8", "shape": [1], "data_offsets": [end, end + 1]}
    refused(built(header, payload + b"\0"), "more")


def test_tensors_that_overlap_are_refused(good: bytes) -> None:
    header, payload = layout(good)
    # All 28 bytes as tokens; the offsets are some of the same bytes.
    header["tokens"] |= {"shape": [len(payload) // 2], "data_offsets": [0, len(payload)]}
    refused(built(header, payload))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "cbtm-shard-2"),
        ("format", None),
        ("vocab_size", "many"),
        ("vocab_size", "3"),
        ("vocab_size", "-1"),
        ("eos_token_id", ""),
        ("eos_token_id", "4"),
        ("eos_token_id", "-1"),
        ("eos_token_id", "1" * 30),
    ],
)
def test_metadata_that_does_not_hold_is_refused(good: bytes, field: str, value: str | None) -> None:
    header, payload = layout(good)
    header["__metadata__"][field] = value
    refused(built(header, payload))


_numbers = st.one_of(
    st.integers(-(2**70), 2**70), st.integers(-9, 40), st.floats(), st.none(), st.booleans(), st.text(max_size=3)
)
_entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U16", "U32", "I64", "F32", "", None, 3]),
        "shape": st.one_of(st.lists(_numbers, max_size=2), _numbers),
        "data_offsets": st.one_of(st.lists(_numbers, max_size=3), _numbers),
    }
)


@given(name=st.sampled_from(["tokens", "document_offsets"]), entry=_entry)
@settings(max_examples=60, deadline=None)
def test_an_entry_that_says_something_else_is_refused(good: bytes, name: str, entry: dict[str, Any]) -> None:
    header, payload = layout(good)
    if entry == header[name]:
        return
    header[name] = entry
    refused(built(header, payload))


@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_a_changed_byte_is_refused_or_reads_as_a_valid_shard(good: bytes, place: int, value: int) -> None:
    """Content is protected by its SHA-256; reading must only never crash or yield what is out of range."""
    data = bytearray(good)
    data[place % len(data)] = value
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        path.write_bytes(bytes(data))
        try:
            shard = read_shard(path)
        except IntegrityError:
            return
        assert all((document < shard.vocab_size).all() for document in shard.documents())
