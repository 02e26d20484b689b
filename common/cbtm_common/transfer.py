"""Moves bytes by signed URLs, over HTTP.

A download goes to `NAME.part`, resumes by Range where it broke, is checked against length and SHA-256, and is renamed
into place whole. An upload is one PUT, or parts, of which the server lists only the missing ones, so that an 80 GB
checkpoint goes on where it stopped. A transfer that moves no byte for `stall_seconds` is broken off and tried again.
Redirects are not followed: a signed URL is for the host that it names.

Not here: what to transfer, and new URLs for expired ones (`UrlExpired` says when to ask for them).
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self
from urllib.parse import urljoin, urlsplit

import httpx

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.errors import (
    AlreadyExists,
    Cancelled,
    CbtmError,
    IntegrityError,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from cbtm_common.rpc import RetryPolicy

_CHUNK = 1 << 18
OnBytes = Callable[[int], None]


class UrlExpired(Unavailable):
    """The signed URL is no longer good; ask the coordinator for a new one."""


def _ignore(_: int) -> None:
    return None


class Transfer:
    """An HTTP client for signed requests; thread-safe; a context manager.

    `base_url` is what path-only URLs are joined to: a string, or a function that gives it when needed.
    """

    def __init__(
        self,
        *,
        base_url: str | Callable[[], str],
        stall_seconds: float = 60.0,
        policy: RetryPolicy | None = None,
    ) -> None:
        self._base_url = base_url
        self._policy = policy or RetryPolicy(attempts=8, initial=0.3, maximum=20.0)
        self._client = httpx.Client(timeout=httpx.Timeout(stall_seconds, connect=15.0), follow_redirects=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def download(
        self,
        download: pb.Download,
        destination: Path,
        *,
        on_bytes: OnBytes = _ignore,
        cancelled: threading.Event | None = None,
    ) -> None:
        """Fetches `download.file` to `destination`. Raises IntegrityError when what came is not that file."""
        destination.parent.mkdir(parents=True, exist_ok=True)
        part = destination.with_name(destination.name + ".part")
        self._retry(lambda: self._download_rest(download, part, on_bytes, cancelled), cancelled)
        file = download.file
        size, digest = _size_and_hash(part)
        if size != file.size or digest != file.sha256:
            part.unlink()
            raise IntegrityError(
                f"{file.path}: received {size} bytes with SHA-256 {digest}, expected {file.size} with {file.sha256}"
            )
        os.replace(part, destination)

    def upload(
        self,
        upload: pb.Upload,
        source: Path,
        *,
        on_bytes: OnBytes = _ignore,
        cancelled: threading.Event | None = None,
    ) -> None:
        """Sends `source` as `upload` says: nothing when stored, one PUT, or the missing parts."""
        if upload.stored:
            return
        if upload.HasField("multipart"):
            for part in upload.multipart.parts:
                start = (part.part_number - 1) * upload.multipart.part_size
                self._put(part.request, source, start, part.size, on_bytes, cancelled)
        else:
            self._put(upload.request, source, 0, upload.file.size, on_bytes, cancelled)

    def _put(
        self,
        request: pb.SignedRequest,
        source: Path,
        start: int,
        size: int,
        on_bytes: OnBytes,
        cancelled: threading.Event | None,
    ) -> None:
        def attempt() -> None:
            with source.open("rb") as file:
                body = _slices(file, start, size, on_bytes, cancelled)
                headers = {**request.headers, "content-length": str(size)}
                response = self._client.request(request.method, self._url(request), headers=headers, content=body)
            _check(response)

        self._retry(attempt, cancelled)

    def _download_rest(
        self, download: pb.Download, part: Path, on_bytes: OnBytes, cancelled: threading.Event | None
    ) -> None:
        have = part.stat().st_size if part.exists() else 0
        if have > download.file.size:
            part.unlink()
            have = 0
        if have == download.file.size and have > 0:
            return
        request = download.request
        headers = dict(request.headers)
        if have:
            headers["range"] = f"bytes={have}-"
        with self._client.stream(request.method, self._url(request), headers=headers) as response:
            if response.is_error or response.is_redirect:
                response.read()
            _check(response)
            append = response.status_code == 206
            with part.open("ab" if append else "wb") as file:
                written = have if append else 0
                for chunk in response.iter_raw(_CHUNK):
                    if cancelled is not None and cancelled.is_set():
                        raise Cancelled("the download was cancelled")
                    written += len(chunk)
                    if written > download.file.size:
                        raise IntegrityError(
                            f"{download.file.path}: the store sends more than {download.file.size} bytes"
                        )
                    file.write(chunk)
                    on_bytes(len(chunk))
                file.flush()
                os.fsync(file.fileno())
        if written < download.file.size:
            raise Unavailable(f"{download.file.path}: the connection ended after {written} bytes")

    def _url(self, request: pb.SignedRequest) -> str:
        if urlsplit(request.url).scheme in ("http", "https"):
            return request.url
        base = self._base_url if isinstance(self._base_url, str) else self._base_url()
        return urljoin(base, request.url)

    def _retry(self, attempt: Callable[[], None], cancelled: threading.Event | None) -> None:
        """Runs `attempt` until it succeeds, fails for good, or the policy's attempts are used up."""
        waiting = cancelled or threading.Event()
        for number in range(self._policy.attempts):
            try:
                return attempt()
            except UrlExpired:
                raise
            except (Unavailable, httpx.TransportError) as error:
                last = error if isinstance(error, CbtmError) else Unavailable(f"transfer: {error!r}")
                final = number + 1 == self._policy.attempts
            if final or waiting.wait(self._policy.delay(number, random.random())):
                raise last
        return None


def _slices(
    file: BinaryIO, start: int, size: int, on_bytes: OnBytes, cancelled: threading.Event | None
) -> Iterator[bytes]:
    file.seek(start)
    left = size
    while left:
        if cancelled is not None and cancelled.is_set():
            raise Cancelled("the upload was cancelled")
        chunk = file.read(min(_CHUNK, left))
        if not chunk:
            raise IntegrityError(f"{file.name} is shorter than the {start + size} bytes it was described with")
        left -= len(chunk)
        yield chunk
        on_bytes(len(chunk))


def _check(response: httpx.Response) -> None:
    """Turns an HTTP status into one of our errors; the store's own words are kept, cut short."""
    code = response.status_code
    if 200 <= code < 300:
        return
    said = f"the object store answered {code}: {response.text[:300]}"
    if code in (401, 403):
        raise UrlExpired(said)
    if code == 404:
        raise NotFound(said)
    if code in (409, 412):
        raise AlreadyExists(said)
    if code == 507:
        raise ResourceExhausted(said)
    if code >= 500 or code in (408, 425, 429):
        raise Unavailable(said)
    raise IntegrityError(said)


def _size_and_hash(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return path.stat().st_size, digest
