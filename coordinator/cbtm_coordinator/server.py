"""The coordinator process: composes registry, object store and services, serves until told to stop, drains.

SIGTERM or SIGINT: health turns NOT_SERVING, new calls are refused as UNAVAILABLE (clients try again), calls in progress
finish, exit 0. A second signal ends at once. Nothing that matters is kept in memory, so `kill -9` costs nothing.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from importlib.metadata import version
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection

from cbtm_api.v1 import admin_service_pb2_grpc, catalog_service_pb2_grpc, worker_service_pb2_grpc
from cbtm_common.errors import InvalidState, Unavailable
from cbtm_common.security import check_insecure
from cbtm_coordinator import migrations
from cbtm_coordinator.config import RECEIPT_KEY_NAME, SIGNING_KEY_NAME, CoordinatorConfig
from cbtm_coordinator.grpc_server import GrpcServer
from cbtm_coordinator.limits import Limiter
from cbtm_coordinator.services.admin import AdminServicer
from cbtm_coordinator.services.auth import ADMIN_SERVICE, CATALOG_SERVICE, WORKER_SERVICE, Authenticator
from cbtm_coordinator.services.catalog import CatalogServicer
from cbtm_coordinator.services.commit import Verifier
from cbtm_coordinator.services.context import ServiceContext
from cbtm_coordinator.services.interceptors import ServerInterceptor
from cbtm_coordinator.services.reaper import Reaper
from cbtm_coordinator.services.structure import Structures
from cbtm_coordinator.services.worker import WorkerServicer
from cbtm_coordinator.storage import LocalStore, StorageConfig, load_or_create_key, open_object_store
from cbtm_coordinator.store import Store
from cbtm_coordinator.tls import Certificates

_log = logging.getLogger(__name__)
# After the calls are over: what runs beside them may be in the midst of a request to a store that does not answer.
_CLOSE_SECONDS = 2.0
_SERVICES = (WORKER_SERVICE, CATALOG_SERVICE, ADMIN_SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME)


class Coordinator:
    """A running coordinator. `port` and `http_port` are the real ones; `http_port` 0 with an S3 store."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self.config = config
        if not config.data_dir.is_dir():
            raise InvalidState(f"data_dir: there is no folder {config.data_dir}; run `cbtm-coord init` for it first")
        check_insecure(config.host, config.insecure)
        self._certificates = None if config.insecure else Certificates(config)
        self.fingerprint = self._certificates.fingerprint if self._certificates else ""
        self.store = open_registry(config)
        key = load_or_create_key(config.data_dir / SIGNING_KEY_NAME)
        self.objects = open_object_store(
            StorageConfig(
                location=config.storage_location,
                signing_key=key,
                public_url=config.public_http_url,
                endpoint_url=config.s3_endpoint_url,
                public_endpoint_url=config.s3_public_endpoint_url,
                region=config.s3_region,
                path_style=config.s3_path_style,
            )
        )
        self.objects.check()
        self._draining = threading.Event()
        self._http: Any = None
        self._http_thread: threading.Thread | None = None
        self.http_port = self._serve_http() if isinstance(self.objects, LocalStore) else 0
        context = ServiceContext(
            store=self.store,
            objects=self.objects,
            secret_key=key,
            receipt_key=load_or_create_key(config.data_dir / RECEIPT_KEY_NAME),
            url_ttl=config.url_ttl,
            quotas=config.quotas,
            version=version("cbtm"),
            fingerprint=self.fingerprint,
            credential_life=_seconds(config.credential_seconds),
        )
        self._verifier = Verifier(self.objects, part_size=context.part_size)
        self._structures = Structures(self.store, self.objects)
        self._executor = ThreadPoolExecutor(config.threads, thread_name_prefix="grpc")
        self._grpc = self._build(context)
        self.port = self._bind()
        self._reaper = Reaper(
            self.store,
            self.objects,
            interval=config.reaper_seconds,
            orphan_interval=_seconds(config.orphan_seconds),
            orphan_grace=_seconds(config.orphan_grace_seconds),
        )

    def _build(self, context: ServiceContext) -> GrpcServer:
        told = 0 if self.config.public_http_url else self.http_port
        authenticator = Authenticator(self.store, context.credentials, public_catalog=self.config.public_catalog)
        interceptor = ServerInterceptor(
            authenticator,
            limiter=Limiter(self.config.rates),
            executor=self._executor,
            http_port=told,
            draining=self._draining.is_set,
        )

        def register(server: grpc.aio.Server) -> None:
            worker = WorkerServicer(context, self._verifier, self._structures)
            worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(worker, server)
            catalog_service_pb2_grpc.add_CatalogServiceServicer_to_server(CatalogServicer(context), server)
            admin = AdminServicer(context, self._structures)
            admin_service_pb2_grpc.add_AdminServiceServicer_to_server(admin, server)

        return GrpcServer(interceptor, register=register, services=_SERVICES)

    def _bind(self) -> int:
        host, port = self.config.host, self.config.port
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._certificates is None:
                return int(self._grpc.add_insecure_port(address))
            return int(self._grpc.add_secure_port(address, self._certificates.grpc_credentials()))
        except RuntimeError as error:
            raise Unavailable(
                f"port: {host}:{port} cannot be bound; is another coordinator running? --port takes another"
            ) from error

    def _serve_http(self) -> int:
        import uvicorn

        from cbtm_coordinator.storage.http_app import make_app
        from cbtm_coordinator.storage.http_protocol import guarded_protocol, run_server

        assert isinstance(self.objects, LocalStore)
        listener = socket.socket(socket.AF_INET6 if ":" in self.config.host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((self.config.host, self.config.http_port))
        except OSError as error:
            raise Unavailable(
                f"http_port: {self.config.host}:{self.config.http_port} cannot be bound ({error.strerror}); "
                "--http-port takes another"
            ) from error
        settings = uvicorn.Config(
            make_app(self.objects),
            http=guarded_protocol(connections_per_address=self.config.http_connections_per_address),
            log_level="warning",
            access_log=False,
            timeout_keep_alive=75,
            lifespan="off",
            ssl_context_factory=None if self._certificates is None else self._tls,
        )
        self._http = uvicorn.Server(settings)
        serve = (self._http, [listener])
        self._http_thread = threading.Thread(target=run_server, args=serve, name="http", daemon=True)
        return int(listener.getsockname()[1])

    def _tls(self, config: Any, default: Any) -> ssl.SSLContext:
        assert self._certificates is not None
        return self._certificates.http_context()

    def start(self) -> None:
        if self._http_thread is not None:
            self._http_thread.start()
        self._grpc.start()
        self._reaper.start()

    def stop(self) -> None:
        """Drains: refuses new calls, finishes those in progress for `drain_seconds` at most, closes everything.

        What does not end by then is left: a thread may be waiting for a database or a store that does not answer.
        """
        ends = time.monotonic() + self.config.drain_seconds
        self._grpc.leave()
        self._draining.set()
        self._grpc.stop(self.config.drain_seconds)
        self._executor.shutdown(wait=False)
        if self._http is not None and self._http_thread is not None:
            self._http.should_exit = True
            self._http_thread.join(max(_CLOSE_SECONDS, ends - time.monotonic()))
        if not self._reaper.close(_CLOSE_SECONDS):
            _log.info("housekeeping is left in the midst of a round; the next coordinator finishes it")
        if not self._verifier.close(_CLOSE_SECONDS):
            _log.info("a check of a checkpoint is broken off; it begins anew when its worker asks again")
        self.store.close()


def open_registry(config: CoordinatorConfig) -> Store:
    """The registry, checked to be of this version. Raises InvalidState, saying what to run."""
    store = Store(config.registry_url, pool_size=config.database_connections)
    store.ping()
    current, head = migrations.current_and_head(store.engine)
    if current is None:
        raise InvalidState("the registry is empty: run `cbtm-coord init` (or `cbtm-coord db upgrade`) first")
    if current != head:
        raise InvalidState(f"the registry is at revision {current}, this version needs {head}: `cbtm-coord db upgrade`")
    return store


def _seconds(value: float) -> timedelta:
    return timedelta(seconds=value)
