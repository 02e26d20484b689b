"""The HTTP endpoint of the local backend: `GET|HEAD|PUT /v1/objects/<key>` by signed URLs, and `GET /healthz`.

A request is checked whole before a byte of its body is read: signature, expiry, and the declared length against the
signed one. A body is hashed while it goes to a temporary file, and becomes an object only if it is what was signed.
Who moves no byte for `stall_seconds`, or fewer than 1 KiB a second in the long run, is cut off, sending or receiving.
Errors are small JSON objects `{"reason", "message"}`:

    400 not a key, or a body that is not what was signed    409 another object is there already
    401 no signature    403 wrong or expired signature      411 no content-length    413 longer than signed
    404 no such object or upload    408 the body stalled    416 no such range        507 the disk is full
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cbtm_common.errors import (
    AlreadyExists,
    CbtmError,
    IntegrityError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
)
from cbtm_coordinator.storage.base import CHUNK
from cbtm_coordinator.storage.local import Incoming, LocalStore
from cbtm_coordinator.storage.signing import OBJECTS_PATH, Grant

_log = logging.getLogger(__name__)

STALL_SECONDS = 60.0
_MIN_BYTES_PER_SECOND = 1024
# After an error the rest of a body is read and dropped for so long, so that the sender gets to read the answer.
_DRAIN_SECONDS = 5.0
_RANGE = re.compile(r"bytes=(\d*)-(\d*)", re.ASCII)

_STATUS: dict[type[CbtmError], int] = {
    InvalidArgument: 400,
    IntegrityError: 400,
    Unauthenticated: 401,
    PermissionDenied: 403,
    NotFound: 404,
    AlreadyExists: 409,
    ResourceExhausted: 507,
}


def make_app(
    store: LocalStore, *, stall_seconds: float = STALL_SECONDS, healthy: Callable[[], bool] = lambda: True
) -> Starlette:
    """The ASGI application over `store`. `/healthz` answers 503 while `healthy()` is false."""

    drain_seconds = min(_DRAIN_SECONDS, stall_seconds)

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"}) if healthy() else JSONResponse({"status": "draining"}, status_code=503)

    async def objects(request: Request) -> Response:
        try:
            raw_path = request.scope["raw_path"].decode("ascii", errors="replace")
            grant = store.signer.check(request.method, raw_path, request.url.query)
            if request.method == "PUT":
                _check_length(request, grant)
                return await _put(store, grant, request, stall_seconds)
            return await run_in_threadpool(_answer, store, grant, request, stall_seconds)
        except CbtmError as error:
            return await _refuse(
                request, _STATUS.get(type(error), 500), error.reason, error.message, drain_seconds=drain_seconds
            )
        except _WrongLength as error:
            return await _refuse(request, error.status, "INVALID_ARGUMENT", str(error), drain_seconds=drain_seconds)
        except OSError as error:
            # A disk that fails: whoever sends tries again.
            _log.error("%s %s: %s", request.method, request.url.path, error)
            return await _refuse(request, 500, "IO", "the store's disk failed", drain_seconds=drain_seconds)
        except ClientDisconnect:
            # Nobody is left to read it.
            return Response(status_code=400)

    return Starlette(
        routes=[
            Route("/healthz", health, methods=["GET"]),
            Route(OBJECTS_PATH + "{key:path}", objects, methods=["GET", "HEAD", "PUT"]),
        ]
    )


class _Pace:
    """Who has moved `moved` bytes since the start: too slow by now?"""

    def __init__(self, stall_seconds: float) -> None:
        self._stall_seconds = stall_seconds
        self._start = time.monotonic()
        self.moved = 0

    def too_slow(self) -> bool:
        late = time.monotonic() - self._start - self._stall_seconds
        return late > 0 and self.moved < late * _MIN_BYTES_PER_SECOND


class _WrongLength(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def _check_length(request: Request, grant: Grant) -> None:
    declared = request.headers.get("content-length", "")
    if not declared.isdecimal():
        raise _WrongLength(411, "content-length is missing")
    if int(declared) != grant.size:
        status = 413 if int(declared) > grant.size else 400
        raise _WrongLength(status, f"content-length is {declared}; {grant.size} was signed")


async def _put(store: LocalStore, grant: Grant, request: Request, stall_seconds: float) -> Response:
    body = _Body(request, stall_seconds)
    try:
        # Small enough to wait for in memory: a thread for the whole of it, not one for each step.
        if grant.size <= CHUNK:
            await run_in_threadpool(_store, store, grant, [chunk async for chunk in body])
        else:
            incoming = await run_in_threadpool(store.receive, grant.size)
            # Leaving removes a file: quick enough for the event loop.
            with incoming:
                await _receive(incoming, body)
                await run_in_threadpool(store.accept, incoming, grant)
    except TimeoutError:
        return Response(status_code=408, headers={"connection": "close"})
    return Response(status_code=200)


class _Body:
    """The chunks of a request's body; TimeoutError when it stalls."""

    def __init__(self, request: Request, stall_seconds: float) -> None:
        self._stream = aiter(request.stream())
        self._stall_seconds = stall_seconds
        self._pace = _Pace(stall_seconds)

    def __aiter__(self) -> _Body:
        return self

    async def __anext__(self) -> bytes:
        async with asyncio.timeout(self._stall_seconds):
            chunk = await anext(self._stream)
        self._pace.moved += len(chunk)
        if self._pace.too_slow():
            raise TimeoutError
        return chunk


def _store(store: LocalStore, grant: Grant, chunks: Sequence[bytes]) -> None:
    with store.receive(grant.size) as incoming:
        for chunk in chunks:
            incoming.write(chunk)
        store.accept(incoming, grant)


async def _receive(incoming: Incoming, body: _Body) -> None:
    """The whole body into `incoming`. Raises TimeoutError when it stalls, InvalidArgument when it is too long."""
    waiting: list[bytes] = []
    size = 0
    async for chunk in body:
        waiting.append(chunk)
        size += len(chunk)
        # A thread for each megabyte, not for each packet.
        if size >= CHUNK:
            await run_in_threadpool(incoming.write, b"".join(waiting))
            waiting, size = [], 0
    await run_in_threadpool(incoming.write, b"".join(waiting))


async def _refuse(request: Request, status: int, reason: str, message: str, *, drain_seconds: float) -> Response:
    if request.method == "PUT":
        try:
            async with asyncio.timeout(drain_seconds):
                async for _ in request.stream():
                    pass
        except (TimeoutError, ClientDisconnect, RuntimeError):
            # RuntimeError: the stream was consumed already.
            _log.debug("a refused body was not read to its end")
    return JSONResponse({"reason": reason, "message": message}, status_code=status, headers={"connection": "close"})


def _answer(store: LocalStore, grant: Grant, request: Request, stall_seconds: float) -> Response:
    """To a GET or HEAD."""
    path = store.path_of(grant.key)
    stat = store.stat(grant.key)
    if stat is None:
        raise NotFound(f"nothing is stored under {grant.key}")
    headers = {"accept-ranges": "bytes"}
    if stat.sha256:
        headers["etag"] = f'"{stat.sha256}"'
    span = parse_range(request.headers.get("range", ""), stat.size)
    if span is None:
        return _File(path, 0, stat.size, status_code=200, headers=headers, stall_seconds=stall_seconds)
    start, end = span
    if start >= end:
        return Response(status_code=416, headers={"content-range": f"bytes */{stat.size}"})
    headers["content-range"] = f"bytes {start}-{end - 1}/{stat.size}"
    return _File(path, start, end, status_code=206, headers=headers, stall_seconds=stall_seconds)


def parse_range(header: str, size: int) -> tuple[int, int] | None:
    """[start, end) of one byte range; empty when it cannot be satisfied; None for the whole (RFC 9110, 14.2)."""
    match = _RANGE.fullmatch(header.replace(" ", ""))
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return max(size - int(last), 0), size
    end = min(int(last) + 1, size) if last else size
    if last and int(last) < int(first):
        return None
    return int(first), end


class _File(Response):
    """Bytes [start, end) of a file; breaks off when the reader stalls."""

    media_type = "application/octet-stream"

    def __init__(self, path: Path, start: int, end: int, *, stall_seconds: float, **response: Any) -> None:
        super().__init__(None, **response)
        self._path = path
        self._start = start
        self._length = end - start
        self._stall_seconds = stall_seconds
        self.headers["content-length"] = str(self._length)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if scope["method"] == "HEAD":
            await send({"type": "http.response.body", "body": b""})
            return
        file = await run_in_threadpool(_open_at, self._path, self._start)
        try:
            await self._send(file, send)
        except TimeoutError:
            # Returning with the body unfinished makes the server close the connection.
            _log.info("a reader of %s stalled; cut off", scope["path"])
        finally:
            file.close()

    async def _send(self, file: BinaryIO, send: Send) -> None:
        pace = _Pace(self._stall_seconds)
        left = self._length
        while True:
            chunk = await run_in_threadpool(file.read, min(CHUNK, left))
            left -= len(chunk)
            message = {"type": "http.response.body", "body": chunk, "more_body": left > 0 and bool(chunk)}
            async with asyncio.timeout(self._stall_seconds):
                await send(message)
            pace.moved += len(chunk)
            if not message["more_body"]:
                return
            if pace.too_slow():
                raise TimeoutError


def _open_at(path: Path, start: int) -> BinaryIO:
    file = path.open("rb")
    file.seek(start)
    return file
