"""Receipts: what was signed is what is read, and nothing else passes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cbtm_common.errors import IntegrityError, InvalidArgument
from cbtm_common.receipts import FORMAT, canonical, public_key_of, sign, verify

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
SAID = {"account": "Zoë", "verified_tokens": 2**60, "lines": [{"tokens": -5}]}


def test_what_was_signed_is_what_is_read() -> None:
    assert verify(sign(SAID, KEY), public_key_of(KEY)) == {**SAID, "format": FORMAT}


def test_the_canonical_form_is_what_other_programs_write() -> None:
    assert canonical({"b": [1, "é\n"], "a": {"y": -2, "x": ""}}) == b'{"a":{"x":"","y":-2},"b":[1,"\xc3\xa9\\n"]}'
    with pytest.raises(TypeError, match="whole"):
        canonical({"lines": [{"tokens": 1.0}]})


def test_layout_and_order_of_the_file_do_not_matter() -> None:
    document = json.loads(sign(SAID, KEY))
    shuffled = {**document, "receipt": dict(reversed(document["receipt"].items()))}
    assert verify(json.dumps(shuffled), public_key_of(KEY))["account"] == "Zoë"


def _changed(**fields: Any) -> str:
    document = json.loads(sign(SAID, KEY))
    document["receipt"] |= fields
    return json.dumps(document)


@pytest.mark.parametrize("fields", [{"verified_tokens": 2**60 + 1}, {"lines": []}, {"account": "Zoe"}, {"more": 1}])
def test_a_changed_receipt_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError, match="not as the holder"):
        verify(_changed(**fields), public_key_of(KEY))


def test_a_receipt_of_somebody_elses_making_is_refused_though_it_names_its_own_key() -> None:
    with pytest.raises(IntegrityError, match=public_key_of(OTHER)):
        verify(sign(SAID, OTHER), public_key_of(KEY))


@pytest.mark.parametrize(
    "document", ["", "[]", "{}", '{"receipt": 1, "signature": "x"}', _changed(tokens=1.5), "[" * 100_000]
)
def test_a_file_that_is_none_is_named_so(document: str) -> None:
    with pytest.raises(InvalidArgument, match="no receipt"):
        verify(document, public_key_of(KEY))


def test_a_receipt_of_a_later_format_and_broken_keys_are_named_so() -> None:
    with pytest.raises(InvalidArgument, match="cbtm-receipt-2"):
        verify(_changed(format="cbtm-receipt-2"), public_key_of(KEY))
    for key in ("", "short", public_key_of(KEY)[:-1], "!" * 43):
        with pytest.raises(InvalidArgument, match="key"):
            verify(sign(SAID, KEY), key)
