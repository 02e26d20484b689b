"""The gRPC server: grpc.aio on an event loop in a thread of its own, with health and reflection.

Callers cost it little: a call that waits for its request or its reader holds no thread. The services themselves are
plain functions, run in threads.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cbtm_common.rpc import CHANNEL_OPTIONS

T = TypeVar("T")

SERVER_OPTIONS: Sequence[tuple[str, int]] = (
    *CHANNEL_OPTIONS,
    # Without it two coordinators on one port would share it silently.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.max_connection_idle_ms", 15 * 60 * 1000),
    # Calls of one connection at once; a worker has a few.
    ("grpc.max_concurrent_streams", 128),
    # Headers are refused unread beyond this.
    ("grpc.max_metadata_size", 8192),
    ("grpc.absolute_max_metadata_size", 16_384),
    # Who connects and says nothing is cut off.
    ("grpc.server_handshake_timeout_ms", 10_000),
)
_HEALTH_SECONDS = 2.0


class GrpcServer:
    """`register` adds the services; `health` names them. All methods block, and may be called from any thread."""

    def __init__(
        self,
        interceptor: grpc.aio.ServerInterceptor[Any, Any],
        *,
        register: Callable[[grpc.aio.Server], None],
        services: Sequence[str],
    ) -> None:
        self._services = ("", *services)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grpc-loop", daemon=True)
        self._thread.start()
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]  # missing in the stubs
        self._server: grpc.aio.Server = self._run(self._make(interceptor, register))

    async def _make(
        self, interceptor: grpc.aio.ServerInterceptor[Any, Any], register: Callable[[grpc.aio.Server], None]
    ) -> grpc.aio.Server:
        server = grpc.aio.server(interceptors=[interceptor], options=list(SERVER_OPTIONS))
        register(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(self._services[1:], server)
        return server

    def add_insecure_port(self, address: str) -> int:
        """The port bound. Raises RuntimeError."""

        async def add() -> int:
            return self._server.add_insecure_port(address)

        return self._run(add())

    def add_secure_port(self, address: str, credentials: grpc.ServerCredentials) -> int:
        """The port bound. Raises RuntimeError."""

        async def add() -> int:
            return self._server.add_secure_port(address, credentials)

        return self._run(add())

    def start(self) -> None:
        self._run(self._server.start())
        self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def leave(self) -> None:
        """Health turns NOT_SERVING: load balancers send no more calls."""
        self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)

    def stop(self, grace: float) -> None:
        """Takes no new calls, and ends those that take longer than `grace` seconds."""
        self._run(self._server.stop(grace))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _set_health(self, status: Any) -> None:
        async def set_all() -> None:
            # A watcher that does not read what it is told would be waited for.
            await asyncio.wait(
                [asyncio.create_task(self._health.set(service, status)) for service in self._services],
                timeout=_HEALTH_SECONDS,
            )

        self._run(set_all())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()
