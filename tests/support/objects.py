"""Object stores under test: how HTTP reaches one, and files to put into it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit, urlunsplit

import httpx

from cbtm_common.files import FileSpec, hash_file
from cbtm_common.rpc import RetryPolicy
from cbtm_coordinator.storage import ObjectStore, Signed

TTL = timedelta(minutes=5)
# The least that S3 takes for any part but the last.
PART = 5 << 20
IMPATIENT = RetryPolicy(attempts=3, initial=0.01, maximum=0.05)
STUBBORN = RetryPolicy(attempts=40, initial=0.01, maximum=0.05)


def make_file(path: Path, size: int, *, seed: int = 0, key: str = "") -> FileSpec:
    """Random bytes in `path`, described; `key` defaults to one of the content's own."""
    path.write_bytes(random.Random(seed).randbytes(size))
    length, digest = hash_file(path)
    return FileSpec(path=path.name, key=key or f"runs/run_1/{digest}/{path.name}", size=length, sha256=digest)


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A store, and how HTTP reaches it."""

    store: ObjectStore
    # What path-only URLs are joined to.
    base_url: str
    port: int
    # The same store, with URLs for another port on loopback.
    store_through: Callable[[int], ObjectStore]

    def send(self, signed: Signed, content: bytes = b"", *, method: str = "", url: str = "") -> httpx.Response:
        """The signed request as it is, or with another method or URL, without `Transfer`'s care."""
        headers = {**signed.headers, "content-length": str(len(content))}
        return httpx.request(
            method or signed.method, urljoin(self.base_url, url or signed.url), headers=headers, content=content
        )


def exchanged(url: str, parameter: str, value: str) -> str:
    """`url` with one query parameter set."""
    parts = urlsplit(url)
    query = {**dict(parse_qsl(parts.query)), parameter: value}
    return urlunsplit(parts._replace(query=urlencode(query)))
