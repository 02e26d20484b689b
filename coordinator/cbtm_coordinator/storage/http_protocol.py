"""What of HTTP is bounded before a request is known: the time of its TLS handshake, the time and size of its head, and
connections of one address.

uvicorn bounds none of it with httptools, leaves a handshake asyncio's minute, and closes a connection only once all is
sent, which a reader that never reads puts off for ever. Bodies and answers are the application's to time (`http_app`).
"""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from cbtm_coordinator.limits import network_of

HEAD_SECONDS = 10.0
# As long as gRPC's.
HANDSHAKE_SECONDS = 10.0
# Our own are under one.
_MAX_HEAD_BYTES = 32 * 1024
# A connection that has been closing for so long is cut.
CLOSING_SECONDS = 30.0


def guarded_protocol(
    *, connections_per_address: int, head_seconds: float = HEAD_SECONDS, closing_seconds: float = CLOSING_SECONDS
) -> type[asyncio.Protocol]:
    """For `uvicorn.Config(http=…)`. `connections_per_address` 0: no limit."""
    open_connections: Counter[str] = Counter()

    class Guarded(HttpToolsProtocol):
        _address = ""
        _head_bytes = 0
        _head: asyncio.TimerHandle | None = None
        _closing: asyncio.TimerHandle | None = None
        _was_closing = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._address = network_of(self.client[0]) if self.client else "unix"
            open_connections[self._address] += 1
            if connections_per_address and open_connections[self._address] > connections_per_address:
                transport.abort()
                return
            self._await_head()
            self._look_again()

        def connection_lost(self, exc: Exception | None) -> None:
            open_connections[self._address] -= 1
            if not open_connections[self._address]:
                del open_connections[self._address]
            self._has_head()
            if self._closing is not None:
                self._closing.cancel()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._head is not None:
                self._head_bytes += len(data)
            super().data_received(data)
            if self._head is not None and self._head_bytes > _MAX_HEAD_BYTES:
                self.transport.abort()

        def on_message_begin(self) -> None:
            self._await_head()
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._has_head()
            super().on_headers_complete()

        def _await_head(self) -> None:
            if self._head is None:
                self._head_bytes = 0
                self._head = self.loop.call_later(head_seconds, self.transport.abort)

        def _has_head(self) -> None:
            if self._head is not None:
                self._head.cancel()
                self._head = None

        def _look_again(self) -> None:
            if self._was_closing:
                self.transport.abort()
                return
            self._was_closing = self.transport.is_closing()
            self._closing = self.loop.call_later(closing_seconds, self._look_again)

    return Guarded


class _Loop(asyncio.SelectorEventLoop):
    """One whose servers give a TLS handshake `handshake_seconds`; uvicorn has no setting for it."""

    def __init__(self, handshake_seconds: float) -> None:
        super().__init__()
        self._handshake_seconds = handshake_seconds

    async def create_server(self, *arguments: Any, **options: Any) -> asyncio.Server:
        if options.get("ssl") is not None:
            options["ssl_handshake_timeout"] = self._handshake_seconds
        return await super().create_server(*arguments, **options)


def run_server(
    server: uvicorn.Server, listeners: Sequence[socket.socket], *, handshake_seconds: float = HANDSHAKE_SECONDS
) -> None:
    """As `server.run(listeners)`: returns when it was told to exit, and has."""
    with asyncio.Runner(loop_factory=partial(_Loop, handshake_seconds)) as runner:
        runner.run(server.serve(list(listeners)))
