"""A TCP proxy that fails on purpose, to stand before an object store or before coordinators.

Each fault is drawn from a seeded generator and counted by kind:

- `error`: the request is answered 503 and never forwarded;
- `cut_request`: the connection is reset after some bytes of the request went through;
- `truncate`: the connection is closed after some bytes of the answer;
- `slow`: the answer is held to a trickle for a while.

And, told to: `cut` resets all its connections; while it is `closed` it takes none. Of several targets each connection
gets one that answers, at random.

The proxy forwards bytes unchanged otherwise, `Host` included, so signatures made for its address stay valid.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Self


@dataclass(frozen=True, kw_only=True)
class FaultRates:
    """Probability of each fault, for each connection (`error`, `cut_request`) or each answer's start."""

    error: float = 0.0
    cut_request: float = 0.0
    truncate: float = 0.0
    slow: float = 0.0


_RESPONSE_503 = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_CHUNK = 1 << 16


class FaultProxy:
    """Listens on a loopback port of its own and forwards to `target_ports`; a context manager."""

    def __init__(self, *target_ports: int, seed: int, rates: FaultRates | None = None) -> None:
        self.target_ports = target_ports
        self.rates = rates or FaultRates()
        self.closed = False
        self.injected: Counter[str] = Counter()
        self.port = 0
        self._random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(10):
            raise RuntimeError("the fault proxy did not start")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._accept, "127.0.0.1", self.port))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        # Until every connection is closed: what is left open would be reported as a leak of the test.
        self._loop.run_until_complete(_wind_down())
        self._loop.run_until_complete(server.wait_closed())
        self._loop.close()

    def cut(self) -> None:
        """Resets every connection."""

        def abort() -> None:
            for writer in self._writers:
                writer.transport.abort()

        self._loop.call_soon_threadsafe(abort)

    def _draw(self, kind: str, probability: float) -> bool:
        if self._random.random() >= probability:
            return False
        self.injected[kind] += 1
        return True

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        rates = self.rates
        self._writers.add(writer)
        try:
            if self.closed:
                writer.transport.abort()
            elif self._draw("error", rates.error):
                await reader.read(_CHUNK)
                writer.write(_RESPONSE_503)
                await writer.drain()
            else:
                await self._forward(reader, writer, rates)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            # A peer went away, or the proxy ends: nobody is left to be told.
            pass
        finally:
            self._writers.discard(writer)
            await _close(writer)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To a target that answers; ConnectionRefusedError when none does."""
        ports = self._random.sample(self.target_ports, len(self.target_ports))
        for port in ports[:-1]:
            with contextlib.suppress(ConnectionRefusedError):
                return await asyncio.open_connection("127.0.0.1", port)
        return await asyncio.open_connection("127.0.0.1", ports[-1])

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rates: FaultRates) -> None:
        up_reader, up_writer = await self._connect()
        limit = self._random.randrange(1, 1 << 20) if self._draw("cut_request", rates.cut_request) else None
        sending = asyncio.ensure_future(self._pump(reader, up_writer, limit=limit))
        answering = asyncio.ensure_future(self._answer(up_reader, writer, rates))
        try:
            done, _ = await asyncio.wait({sending, answering}, return_when=asyncio.FIRST_COMPLETED)
            if sending in done and limit is None and not answering.done():
                await asyncio.wait({answering}, timeout=60)
            if limit is not None:
                writer.transport.abort()
        finally:
            for task in (sending, answering):
                task.cancel()
            await asyncio.gather(sending, answering, return_exceptions=True)
            await _close(up_writer)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, limit: int | None) -> None:
        sent = 0
        while chunk := await source.read(_CHUNK):
            if limit is not None and sent + len(chunk) >= limit:
                sink.write(chunk[: limit - sent])
                await sink.drain()
                return
            sent += len(chunk)
            sink.write(chunk)
            await sink.drain()
        if sink.can_write_eof():
            sink.write_eof()

    async def _answer(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, rates: FaultRates) -> None:
        while chunk := await source.read(_CHUNK):
            if self._draw("truncate", rates.truncate):
                sink.write(chunk[: self._random.randrange(len(chunk))])
                await sink.drain()
                return
            if self._draw("slow", rates.slow):
                for start in range(0, len(chunk), 4096):
                    sink.write(chunk[start : start + 4096])
                    await sink.drain()
                    await asyncio.sleep(0.05)
            else:
                sink.write(chunk)
                await sink.drain()


async def _wind_down() -> None:
    """Ends all tasks of the loop, and those that come of connections just taken."""
    while True:
        # A connection has its task some steps after it was taken; one cancelled before its first step closes nothing.
        for _ in range(8):
            await asyncio.sleep(0)
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        if not tasks:
            return
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _close(writer: asyncio.StreamWriter) -> None:
    """At once: bytes that the other side does not read must not keep it open."""
    if writer.transport.get_write_buffer_size():
        writer.transport.abort()
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
