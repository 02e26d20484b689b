"""Sends a draft run's files to the object store by signed URLs, and registers its clusters.

What the store holds already is not sent again. URLs that expire under way are signed anew and the rest goes on; so is
what a store could not take for a while, as long as less is left each time. A coordinator that restarts is waited for.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.errors import PermissionDenied, Unavailable
from cbtm_common.files import FileSpec
from cbtm_common.ids import new_request_id
from cbtm_common.rpc import Connection, RetryPolicy
from cbtm_common.transfer import Transfer, UrlExpired

T = TypeVar("T")

# By path in the set: where the file lies, and what it is.
Files = Mapping[str, tuple[Path, FileSpec]]

_THREADS = 4
_BATCH_FILES = 32
# Rounds of new URLs in which nothing more arrived, before it is no longer called expiry.
_VAIN_ROUNDS = 3
# About five minutes: hours of work are not given up because the coordinator is being upgraded.
_PATIENCE = RetryPolicy(attempts=36, initial=0.5, maximum=10.0)
# gRPC takes messages of 4 MiB.
_REGISTER_BYTES = 2 * 1024 * 1024
# The coordinator checks every object of a call against the store before it answers.
_REGISTER_SECONDS = 600.0
_REGISTER_SHARDS = 256


def upload_files(
    connection: Connection,
    run_id: str,
    kind: ad.RunFileKind.ValueType,
    files: Files,
    *,
    on_bytes: Callable[[int], None],
) -> None:
    """Sends `files`. `on_bytes` calls add up to their sizes, and come from several threads.

    Raises PermissionDenied when the store refuses one newly signed URL after the other, saying what it answered.
    """
    paths = list(files)
    stop = threading.Event()
    with Transfer.beside(connection) as transfer, ThreadPoolExecutor(_THREADS) as pool:
        try:
            for start in range(0, len(paths), _BATCH_FILES):
                batch = {path: files[path] for path in paths[start : start + _BATCH_FILES]}
                _send(connection, run_id, kind, batch, transfer, pool, stop, on_bytes)
        except BaseException:
            # Ctrl-C must not wait for what is under way.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _send(
    connection: Connection,
    run_id: str,
    kind: ad.RunFileKind.ValueType,
    batch: Files,
    transfer: Transfer,
    pool: ThreadPoolExecutor,
    stop: threading.Event,
    on_bytes: Callable[[int], None],
) -> None:
    meters = {path: _Meter(spec.size, on_bytes) for path, (_, spec) in batch.items()}
    left = dict(batch)
    least, vain = None, 0
    while left:
        request = ad.PrepareRunUploadRequest(
            request_id=new_request_id(), run_id=run_id, kind=kind, files=[spec.to_proto() for _, spec in left.values()]
        )
        uploads = _prepare(connection, request)
        due = sum(map(_due, uploads))
        vain = 0 if least is None or due < least else vain + 1
        least = due if least is None else min(due, least)
        jobs: dict[str, Future[None]] = {
            upload.file.path: pool.submit(
                transfer.upload,
                upload,
                left[upload.file.path][0],
                on_bytes=meters[upload.file.path].add,
                cancelled=stop,
            )
            for upload in uploads
        }
        for path, job in jobs.items():
            try:
                job.result()
            except Unavailable as error:
                if vain >= _VAIN_ROUNDS:
                    raise _refused(path, error) from error
                continue
            meters[path].finish()
            del left[path]


def _prepare(connection: Connection, request: ad.PrepareRunUploadRequest) -> Sequence[pb.Upload]:
    return patiently(lambda: connection.admin.PrepareRunUpload(request)).uploads


def _refused(path: str, error: Unavailable) -> Exception:
    if not isinstance(error, UrlExpired):
        return error
    return PermissionDenied(
        f"upload: {path} cannot be sent; of {_VAIN_ROUNDS + 1} newly signed URLs none was good: {error.message}; check "
        "what the coordinator's credentials may do in the object store, and that the clocks of both agree"
    )


def patiently(call: Callable[[], T]) -> T:
    """What `call` returns, which may be made again. Waits some minutes for a coordinator that is not there."""
    for attempt in range(_PATIENCE.attempts - 1):
        try:
            return call()
        except Unavailable:
            time.sleep(_PATIENCE.delay(attempt, random.random()))
    return call()


def _due(upload: pb.Upload) -> int:
    """Bytes that the store does not hold yet."""
    if upload.stored:
        return 0
    return sum(p.size for p in upload.multipart.parts) if upload.HasField("multipart") else upload.file.size


class _Meter:
    """Bytes of one file, those sent twice counted once. Transfer calls it from one thread at a time."""

    def __init__(self, size: int, on_bytes: Callable[[int], None]) -> None:
        self._left = size
        self._on_bytes = on_bytes

    def add(self, count: int) -> None:
        step = min(count, self._left)
        self._left -= step
        self._on_bytes(step)

    def finish(self) -> None:
        self.add(self._left)


def register_clusters(connection: Connection, run_id: str, clusters: Sequence[ad.NewCluster]) -> None:
    """Tells the coordinator of clusters whose shards have been sent, some at a time."""
    for batch in _batches(clusters):
        request = ad.RegisterClustersRequest(request_id=new_request_id(), run_id=run_id, clusters=batch)
        _register(connection, request)


def _register(connection: Connection, request: ad.RegisterClustersRequest) -> None:
    patiently(lambda: connection.admin.RegisterClusters(request, timeout=_REGISTER_SECONDS))


def _batches(clusters: Sequence[ad.NewCluster]) -> Iterator[list[ad.NewCluster]]:
    batch: list[ad.NewCluster] = []
    size = shards = 0
    for cluster in clusters:
        if batch and (size + cluster.ByteSize() > _REGISTER_BYTES or shards + len(cluster.shards) > _REGISTER_SHARDS):
            yield batch
            batch, size, shards = [], 0, 0
        batch.append(cluster)
        size += cluster.ByteSize()
        shards += len(cluster.shards)
    if batch:
        yield batch
