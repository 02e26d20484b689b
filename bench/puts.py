"""Ways to bring the bytes of a signed upload to the store, cheap enough not to be what is measured."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.security import Trust
from cbtm_coordinator.storage import LocalStore, UrlSigner

# Brings the bytes of a signed upload to the store.
Send = Callable[[pb.Upload, bytes], Awaitable[None]]


class Puts:
    """PUTs over kept connections, by hand: an HTTP library would cost more than the server that is measured."""

    def __init__(self, url: str, trust: Trust) -> None:
        self._host, _, self._port = url.partition("://")[2].partition(":")
        self._tls = None if trust.plain else trust.http_context()
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __call__(self, upload: pb.Upload, data: bytes) -> None:
        path, headers = upload.request.url, upload.request.headers
        if self._idle:
            reader, writer = self._idle.pop()
        else:
            reader, writer = await asyncio.open_connection(self._host, int(self._port), ssl=self._tls)
        lines = [f"PUT {path} HTTP/1.1", f"host: {self._host}", f"content-length: {len(data)}"]
        lines += [f"{name}: {value}" for name, value in headers.items() if name.lower() != "content-length"]
        writer.write("\r\n".join([*lines, "", ""]).encode() + data)
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"PUT {path}: {head.decode()}")
        await reader.readexactly(int(head.lower().partition(b"content-length:")[2].partition(b"\r")[0]))
        self._idle.append((reader, writer))

    def close(self) -> None:
        for _, writer in self._idle:
            writer.close()


def placing(folder: Path) -> Send:
    """Straight into the embedded store's folder."""
    store = LocalStore(folder, UrlSigner(secrets.token_bytes(32)))

    async def place(upload: pb.Upload, data: bytes) -> None:
        store.put_bytes(upload.file.key, data)

    return place
