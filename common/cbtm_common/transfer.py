"""Moves bytes by signed URLs, over HTTP.

A download goes to `NAME.part`, resumes by Range where it broke, is checked against length and SHA-256, and is renamed
into place whole. An upload is one PUT, or parts of which the server lists only the missing ones, so that an 80 GB
checkpoint goes on where it stopped. A transfer that moves no byte for `timeout` seconds is broken off and tried again
with jittered back-off; as long as attempts bring bytes, a download never gives up. Redirects are refused: a signed URL
is for the host that it names.

Not here: what to transfer, and new URLs for expired ones (`UrlExpired` says when to ask for them).
"""

from __future__ import annotations

import os
import random
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urljoin, urlsplit

import httpx

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.errors import (
    AlreadyExists,
    Cancelled,
    IntegrityError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from cbtm_common.faults import point
from cbtm_common.files import is_disk_full
from cbtm_common.partial_file import PartialFile
from cbtm_common.rpc import Connection, RetryPolicy

_CHUNK = 1 << 18
_CONNECT_SECONDS = 15.0
# An S3 server says so with 400: the body stalled on its side.
_RETRYABLE_400 = ("RequestTimeout", "IncompleteBody")

# Called with the number of bytes just moved. Bytes sent again after a failure count again.
OnBytes = Callable[[int], None]


class UrlExpired(Unavailable):
    """The signed URL (or the upload that it is a part of) is no longer good; ask the coordinator for a new one."""


class Transfer:
    """An HTTP client for signed requests; thread-safe; a context manager.

    `base_url` is what path-only URLs are joined to: a string, or a function that gives it when needed; `base_tls` gives
    what to trust there, if that is not what the system trusts. `timeout` is in seconds without a byte; `parallel_parts`
    parts of one upload are sent at a time; `transport` is httpx's seam.
    """

    def __init__(
        self,
        *,
        base_url: str | Callable[[], str] = "",
        base_tls: Callable[[], ssl.SSLContext] | None = None,
        timeout: float = 60.0,
        policy: RetryPolicy | None = None,
        parallel_parts: int = 3,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._base_url = base_url
        self._policy = policy or RetryPolicy(attempts=8, initial=0.3, maximum=20.0)
        self._parallel_parts = parallel_parts
        self._timeout = timeout
        self._transport = transport
        self._base_tls = base_tls
        self._opening = threading.Lock()
        self._client = self._open(True)
        self._base_client = self._client if base_tls is None else None

    @classmethod
    def beside(cls, connection: Connection) -> Self:
        """Path-only URLs are those of this connection's coordinator."""
        return cls(base_url=lambda: connection.http_base, base_tls=connection.http_context)

    def _open(self, verify: ssl.SSLContext | bool) -> httpx.Client:
        # No limit on connections: whoever calls from many threads must not wait for a pool, and time out.
        return httpx.Client(
            timeout=httpx.Timeout(self._timeout, connect=min(self._timeout, _CONNECT_SECONDS)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=16),
            follow_redirects=False,
            transport=self._transport,
            verify=verify,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()
        if self._base_client is not None:
            self._base_client.close()

    def download(
        self,
        download: pb.Download,
        destination: Path,
        *,
        on_bytes: OnBytes | None = None,
        cancelled: threading.Event | None = None,
    ) -> None:
        """Fetches `download.file` to `destination`; what is there is replaced. One caller a destination.

        Raises IntegrityError when what came is not that file, UrlExpired, NotFound, ResourceExhausted (disk full),
        Cancelled, or Unavailable when attempts brought nothing.
        """
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = PartialFile(destination.with_name(destination.name + ".part"), download.file)
        stop = _Stop(cancelled)
        report = on_bytes or _ignore
        while True:
            resumed = partial.open()
            try:
                self._retry(lambda: self._fetch(download, partial, report, stop), stop, lambda: partial.size)
                wrong = partial.wrong()
            except OSError as error:
                raise _disk_error(error, partial.path) from error
            finally:
                partial.close()
            if not wrong:
                point("transfer.download.before_rename")
                os.replace(partial.path, destination)
                point("transfer.download.after_rename")
                return
            partial.path.unlink()
            # What an earlier process left may have been of something else; what came whole just now was not.
            if not resumed:
                raise IntegrityError(f"{download.file.path}: {wrong}", metadata={"key": download.file.key})

    def upload(
        self,
        upload: pb.Upload,
        source: Path,
        *,
        on_bytes: OnBytes | None = None,
        cancelled: threading.Event | None = None,
    ) -> None:
        """Sends `source` as `upload` says: nothing when stored, one PUT, or the missing parts.

        `on_bytes` is never called by two threads at once. Raises UrlExpired (prepare again: what is stored by then is
        left out), IntegrityError (`source` is not the file described), AlreadyExists, ResourceExhausted, Cancelled, or
        Unavailable.
        """
        if upload.stored:
            return
        size = source.stat().st_size
        if size != upload.file.size:
            raise IntegrityError(f"{source}: {size} bytes, but it was described with {upload.file.size}")
        stop = _Stop(cancelled)
        report = _serialised(on_bytes or _ignore)
        if not upload.HasField("multipart"):
            self._put(upload.request, source, 0, size, report, stop)
            return

        def send(part: pb.PartUpload) -> None:
            start = (part.part_number - 1) * upload.multipart.part_size
            try:
                self._put(part.request, source, start, part.size, report, stop)
            except NotFound as error:
                raise UrlExpired(f"the upload in parts is gone; {error.message}") from error

        _in_parallel(send, list(upload.multipart.parts), self._parallel_parts, stop)

    def _put(
        self, request: pb.SignedRequest, source: Path, start: int, size: int, on_bytes: OnBytes, stop: _Stop
    ) -> None:
        def attempt() -> None:
            body = _slice(source, start, size, on_bytes, stop)
            headers = {**request.headers, "content-length": str(size)}
            client, url = self._at(request, "PUT")
            _check(client.request("PUT", url, headers=headers, content=body))

        point("transfer.upload.before_put")
        self._retry(attempt, stop)
        point("transfer.upload.after_put")

    def _fetch(self, download: pb.Download, partial: PartialFile, on_bytes: OnBytes, stop: _Stop) -> None:
        """One attempt at what is missing."""
        file, request = download.file, download.request
        start = partial.size
        if start == file.size and start > 0:
            return
        headers = {**request.headers, "accept-encoding": "identity"}
        if start:
            headers["range"] = f"bytes={start}-"
        client, url = self._at(request, "GET")
        with client.stream("GET", url, headers=headers) as response:
            if not response.is_success:
                response.read()
            if response.status_code == 416:
                partial.truncate()
                raise Unavailable(f"{file.path}: the store has no byte {start}")
            _check(response)
            # A server may ignore Range, or answer another one than was asked for.
            if start and not response.headers.get("content-range", "").startswith(f"bytes {start}-"):
                if response.status_code == 206:
                    raise IntegrityError(f"{file.path}: the store answered another range than was asked for")
                partial.truncate()
            # As they come: with a chunk size, bytes before a break would be lost in httpx's buffer.
            for chunk in response.iter_raw():
                stop.check("download")
                partial.write(chunk)
                on_bytes(len(chunk))
        if partial.size < file.size:
            raise Unavailable(f"{file.path}: the connection ended after {partial.size} of {file.size} bytes")

    def _at(self, request: pb.SignedRequest, method: str) -> tuple[httpx.Client, str]:
        """The client that trusts whom it should there, and the whole URL.

        Raises InvalidArgument for a request that only somebody with other plans would sign.
        """
        if request.method != method:
            raise InvalidArgument(
                f"method: {request.method[:20]!r} where {method} is what moves a file", field="method"
            )
        url, client = request.url, self._client
        if not urlsplit(url).scheme:
            url = urljoin(self._base_url if isinstance(self._base_url, str) else self._base_url(), url)
            if url.startswith("https:"):
                client = self._base()
        if urlsplit(url).scheme not in ("http", "https"):
            raise InvalidArgument(f"url: {url!r} is not an HTTP URL; is the coordinator's HTTP endpoint known?")
        return client, url

    def _base(self) -> httpx.Client:
        with self._opening:
            if self._base_client is None:
                assert self._base_tls is not None
                self._base_client = self._open(self._base_tls())
            return self._base_client

    def _retry(self, attempt: Callable[[], None], stop: _Stop, progress: Callable[[], int] = lambda: 0) -> None:
        """Runs `attempt` until it succeeds, fails for good, or used up the policy's attempts without progress."""
        failures = 0
        while True:
            before = progress()
            try:
                return attempt()
            except UrlExpired:
                raise
            except Unavailable as error:
                last = error
            except httpx.TransportError as error:
                last = Unavailable(f"{type(error).__name__} from the object store: {error}")
            failures = 0 if progress() > before else failures + 1
            if failures >= self._policy.attempts:
                raise last
            stop.pause(self._policy.delay(failures, random.random()))


class _Stop:
    """Set when the caller cancelled, or when a sibling failed."""

    def __init__(self, cancelled: threading.Event | None) -> None:
        self._cancelled = cancelled or threading.Event()
        self.failed = threading.Event()

    def check(self, what: str = "transfer") -> None:
        if self._cancelled.is_set() or self.failed.is_set():
            raise Cancelled(f"the {what} was cancelled")

    def pause(self, seconds: float) -> None:
        """Waits; Cancelled as soon as the caller says so."""
        if self._cancelled.wait(seconds):
            self.check()
        self.check()


def _slice(source: Path, start: int, size: int, on_bytes: OnBytes, stop: _Stop) -> Iterator[bytes]:
    with source.open("rb") as file:
        file.seek(start)
        left = size
        while left:
            stop.check("upload")
            chunk = file.read(min(_CHUNK, left))
            if not chunk:
                raise IntegrityError(f"{source} became shorter while it was sent")
            left -= len(chunk)
            yield chunk
            on_bytes(len(chunk))


def _in_parallel(send: Callable[[pb.PartUpload], None], parts: list[pb.PartUpload], threads: int, stop: _Stop) -> None:
    """Runs `send` for every part; the first failure stops the others, and is what is raised."""

    def run(part: pb.PartUpload) -> None:
        stop.check("upload")
        send(part)

    first: BaseException | None = None
    with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="upload-part") as pool:
        try:
            for future in as_completed([pool.submit(run, part) for part in parts]):
                if first is None and (first := future.exception()) is not None:
                    stop.failed.set()
        except BaseException:
            # Ctrl-C in this thread: the others must not go on with their parts.
            stop.failed.set()
            raise
    if first is not None:
        raise first


def _check(response: httpx.Response) -> None:
    """Turns an HTTP status into one of our errors; the store's own words are kept, cut short."""
    code = response.status_code
    if response.is_success:
        return
    if response.is_redirect:
        raise PermissionDenied(f"the object store redirected to {response.headers.get('location')}: refused")
    text = response.text
    said = f"the object store answered {code}: {text[:300]}"
    if code in (401, 403):
        raise UrlExpired(said)
    if code == 404:
        raise NotFound(said)
    if code in (409, 412):
        raise AlreadyExists(said)
    if code == 507:
        raise ResourceExhausted(said)
    if code >= 500 or code in (408, 425, 429) or (code == 400 and any(word in text for word in _RETRYABLE_400)):
        raise Unavailable(said)
    # The rest means that what was sent is not what was signed: wrong digest, wrong length.
    raise IntegrityError(said)


def _disk_error(error: OSError, path: Path) -> Exception:
    if is_disk_full(error):
        return ResourceExhausted(f"{path.parent}: the disk is full; free some space and try again")
    return error


def _serialised(on_bytes: OnBytes) -> OnBytes:
    lock = threading.Lock()

    def report(count: int) -> None:
        with lock:
            on_bytes(count)

    return report


def _ignore(_: int) -> None:
    return None
