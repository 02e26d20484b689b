"""An ASGI application on a loopback port, served as the coordinator serves its own."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from cbtm_coordinator.storage.http_protocol import HANDSHAKE_SECONDS, run_server


@contextlib.contextmanager
def serve(app: Any, *, handshake_seconds: float = HANDSHAKE_SECONDS, **settings: Any) -> Iterator[int]:
    """Runs an ASGI application in a thread, with `settings` of uvicorn; yields its port."""
    import uvicorn

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, log_level="critical", lifespan="off", ws="none", timeout_graceful_shutdown=1, **settings
    )
    server = uvicorn.Server(config)
    patience = {"handshake_seconds": handshake_seconds}
    thread = threading.Thread(target=run_server, args=(server, [listener]), kwargs=patience, name="uvicorn")
    thread.start()
    try:
        deadline = time.monotonic() + 10
        while not server.started:
            if time.monotonic() > deadline or not thread.is_alive():
                raise RuntimeError("uvicorn did not start")
            time.sleep(0.005)
        yield int(listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
