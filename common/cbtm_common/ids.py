"""Identifiers and secrets.

Ids sort by time of creation, so that tables and listings keep insertion order without a second column. They carry no
meaning and grant no right. Secrets grant rights, and only their SHA-256 is ever stored.
"""

from __future__ import annotations

import hashlib
import secrets
import time
import uuid

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u


def new_id(prefix: str) -> str:
    """`prefix_` and 26 characters: 48 bits of milliseconds, then 80 random bits, as a ULID."""
    number = (time.time_ns() // 1_000_000 << 80) | secrets.randbits(80)
    return f"{prefix}_" + "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def cluster_id(run_id: str, index: int) -> str:
    """The id of cluster `index` of a run: known before registration, since the clustering model names it."""
    return f"{run_id}-c{index:04d}"


def new_request_id() -> str:
    """One for each mutation; its retries carry the same."""
    return str(uuid.uuid4())


def new_secret(role: str) -> str:
    """A bearer secret of 256 random bits, with its role in clear so that a person can tell tokens apart."""
    return f"cbtm_{role}_{secrets.token_urlsafe(32)}"


def hash_secret(secret: str) -> str:
    """SHA-256, hexadecimal. A plain hash is enough for a secret of 256 random bits."""
    return hashlib.sha256(secret.encode()).hexdigest()
