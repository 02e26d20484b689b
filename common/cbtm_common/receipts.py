"""Receipts: what a coordinator says that an account has trained, signed, so that anybody can check it without asking.

A receipt is a JSON object {"receipt": {…}, "public_key", "signature"}. The signature is Ed25519 (RFC 8032), by the
coordinator's receipt key, over the canonical form of "receipt": UTF-8, keys sorted by code point, no white space, no
escapes but those that JSON demands. Its values are text and whole numbers only, of which every JSON library writes the
same. Keys and signatures are base64url without padding.

A signature says that this coordinator wrote it, and nothing else. Whose key it is must come from elsewhere: from the
coordinator itself or its owner.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cbtm_common.errors import IntegrityError, InvalidArgument

FORMAT = "cbtm-receipt-1"
_KEY_BYTES, _SIGNATURE_BYTES = 32, 64


def public_key_of(key: Ed25519PrivateKey) -> str:
    """43 characters."""
    return _encode(key.public_key().public_bytes_raw())


def sign(receipt: Mapping[str, Any], key: Ed25519PrivateKey) -> str:
    """The whole document, as a person can read it."""
    signed = {**receipt, "format": FORMAT}
    document = {
        "receipt": signed,
        "public_key": public_key_of(key),
        "signature": _encode(key.sign(canonical(signed))),
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def verify(document: str, public_key: str) -> dict[str, Any]:
    """What a document says, if it was signed by `public_key`, whatever key it names itself.

    Raises InvalidArgument for a key or a document that is none, IntegrityError for one that this key did not sign.
    """
    key = _decode(public_key, _KEY_BYTES, "key")
    try:
        found = json.loads(document)
        receipt, signature = found["receipt"], found["signature"]
        form = receipt["format"]
        data = canonical(receipt)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidArgument("receipt: this file is no receipt", field="receipt") from error
    if form != FORMAT:
        raise InvalidArgument(f"receipt: its format is {form!r}, this version knows {FORMAT}", field="receipt")
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(_decode(signature, _SIGNATURE_BYTES, "signature"), data)
    except InvalidSignature as error:
        named = found.get("public_key")
        why = "" if named == public_key.strip() else f" (it names the key {named})"
        raise IntegrityError(f"receipt: it is not as the holder of key {public_key.strip()} signed it{why}") from error
    return dict(receipt)


def canonical(receipt: Mapping[str, Any]) -> bytes:
    """Raises TypeError for numbers that are not whole, which not all write the same."""
    _check(receipt)
    return json.dumps(receipt, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _check(value: Any) -> None:
    if isinstance(value, float):
        raise TypeError(f"{value} is not a whole number")
    if isinstance(value, Mapping):
        for item in value.values():
            _check(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check(item)


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _decode(text: Any, size: int, field: str) -> bytes:
    try:
        data = base64.b64decode(text.strip() + "=" * (-len(text.strip()) % 4), altchars=b"-_", validate=True)
    except (AttributeError, binascii.Error, ValueError):
        data = b""
    if len(data) != size:
        raise InvalidArgument(f"{field}: is not {size} bytes in base64url", field=field)
    return data
