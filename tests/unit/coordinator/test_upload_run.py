"""Uploading a draft run's files when URLs expire, are refused or nobody answers; clusters in messages that fit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import httpx
import pytest

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.errors import IntegrityError, PermissionDenied, Unavailable
from cbtm_common.files import FileSpec
from cbtm_common.rpc import RetryPolicy
from cbtm_common.transfer import Transfer, UrlExpired
from cbtm_coordinator import upload_run

SIZE = 100


class Store:
    """Coordinator, transfer and store in one: `refuse(path, attempt)` says which attempts find their URL expired.

    The coordinator does not answer its first `absent` calls. `missing` says how many parts of each file are still to be
    sent in each round.
    """

    def __init__(self, refuse: Callable[[str, int], bool] = lambda path, attempt: False) -> None:
        self.http_base = "http://store"
        self.admin = SimpleNamespace(PrepareRunUpload=self.prepare, RegisterClusters=self.register)
        self.stored: set[str] = set()
        self.attempts: dict[str, int] = {}
        self.prepared: list[list[str]] = []
        self.registered: list[list[int]] = []
        self.raises: Exception | None = None
        self.absent = 0
        self.missing: list[int] = []
        self._refuse = refuse
        self._lock = threading.Lock()

    def prepare(self, request: ad.PrepareRunUploadRequest) -> ad.PrepareRunUploadResponse:
        self._answer()
        self.prepared.append([file.path for file in request.files])
        assert len(self.prepared) < 50, "no end"
        if self.missing:
            parts = [pb.PartUpload(part_number=n + 1, size=10) for n in range(self.missing.pop(0))]
            multipart = pb.MultipartUpload(part_size=10, parts=parts)
            return ad.PrepareRunUploadResponse(uploads=[pb.Upload(file=f, multipart=multipart) for f in request.files])
        return ad.PrepareRunUploadResponse(
            uploads=[pb.Upload(file=file, stored=file.path in self.stored) for file in request.files]
        )

    def _answer(self) -> None:
        if self.absent:
            self.absent -= 1
            raise Unavailable("nobody answers at coordinator:50051")

    def register(self, request: ad.RegisterClustersRequest, timeout: float) -> None:
        self._answer()
        assert request.ByteSize() < 4 * 1024 * 1024
        self.registered.append([cluster.index for cluster in request.clusters])

    # As a Transfer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def upload(self, upload: pb.Upload, source: Path, *, on_bytes: Any, cancelled: threading.Event) -> None:
        path = upload.file.path
        with self._lock:
            attempt = self.attempts[path] = self.attempts.get(path, 0) + 1
        if self.raises is not None:
            raise self.raises
        if upload.stored:
            return
        # Bytes of a refused attempt were sent too.
        on_bytes(upload.file.size)
        if self._refuse(path, attempt):
            raise UrlExpired("the object store answered 403: AccessDenied")
        with self._lock:
            self.stored.add(path)


def send(store: Store, count: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Uploads `count` files; the bytes told of."""
    monkeypatch.setattr(upload_run, "Transfer", SimpleNamespace(beside=lambda _: store))
    told: list[int] = []
    files = {f"f{i}": (Path(f"f{i}"), FileSpec(path=f"f{i}", size=SIZE, sha256="0" * 64)) for i in range(count)}
    upload_run.upload_files(store, "run", ad.RUN_FILE_KIND_SHARD, files, on_bytes=told.append)  # type: ignore[arg-type]
    return sum(told)


def test_all_files_are_sent_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    assert send(store, 70, monkeypatch) == 70 * SIZE
    assert len(store.stored) == 70
    assert [len(batch) for batch in store.prepared] == [32, 32, 6]


def test_what_is_stored_already_counts_as_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    store.stored = {"f0", "f1"}
    assert send(store, 3, monkeypatch) == 3 * SIZE


def test_files_whose_urls_expired_are_signed_again_and_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(refuse=lambda path, attempt: path in ("f1", "f3") and attempt < 3)
    assert send(store, 4, monkeypatch) == 4 * SIZE
    assert store.prepared == [["f0", "f1", "f2", "f3"], ["f1", "f3"], ["f1", "f3"]]


def test_a_store_that_refuses_every_url_is_not_asked_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(refuse=lambda path, attempt: True)
    with pytest.raises(PermissionDenied, match=r"upload: f0 .* 403: AccessDenied; check .* credentials .* clocks"):
        send(store, 2, monkeypatch)
    assert len(store.prepared) == 4


def test_what_the_store_answers_reaches_the_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(403, text="<Code>RequestTimeTooSkewed</Code>")

    store = Store()
    spec = FileSpec(path="shard", size=5, sha256="0" * 64)
    put = pb.SignedRequest(method="PUT", url="/bucket/shard?signature=x")
    answer = ad.PrepareRunUploadResponse(uploads=[pb.Upload(file=spec.to_proto(), request=put)])
    monkeypatch.setattr(store.admin, "PrepareRunUpload", lambda request: answer)
    made = Transfer(base_url="http://store", transport=httpx.MockTransport(refuse))
    monkeypatch.setattr(upload_run, "Transfer", SimpleNamespace(beside=lambda _: made))
    (tmp_path / "shard").write_bytes(b"bytes")
    files = {"shard": (tmp_path / "shard", spec)}
    with pytest.raises(PermissionDenied, match=r"upload: shard .* answered 403: <Code>RequestTimeTooSkewed"):
        upload_run.upload_files(store, "run", ad.RUN_FILE_KIND_SHARD, files, on_bytes=lambda _: None)  # type: ignore[arg-type]
    assert asked == ["http://store/bucket/shard?signature=x"] * 4


def test_a_store_that_forgets_the_parts_that_it_took_is_not_asked_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(refuse=lambda path, attempt: True)
    store.missing = [10, 5] * 100
    with pytest.raises(PermissionDenied):
        send(store, 1, monkeypatch)
    assert len(store.prepared) == 5


def test_slow_progress_through_urls_that_expire_is_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(refuse=lambda path, attempt: attempt <= 20)
    store.missing = list(range(20, 0, -1))
    assert send(store, 1, monkeypatch) == SIZE
    assert len(store.prepared) == 21


def test_a_store_that_is_away_for_a_while_gets_the_rest_later(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    upload, answers = store.upload, [Unavailable("503"), None, Unavailable("503"), None, None]

    def sometimes(*arguments: Any, **options: Any) -> None:
        if (error := answers.pop(0)) is not None:
            raise error
        upload(*arguments, **options)

    monkeypatch.setattr(store, "upload", sometimes)
    assert send(store, 3, monkeypatch) == 3 * SIZE
    assert len(store.stored) == 3
    assert [len(batch) for batch in store.prepared] == [3, 2]


def test_a_store_that_stays_away_is_given_up_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    store.raises = Unavailable("the object store answered 503: SlowDown")
    with pytest.raises(Unavailable, match="503: SlowDown"):
        send(store, 2, monkeypatch)
    assert len(store.prepared) == 4


def test_a_coordinator_that_restarts_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_run, "_PATIENCE", RetryPolicy(attempts=4, initial=0.0))
    store = Store()
    store.absent = 3
    assert send(store, 2, monkeypatch) == 2 * SIZE
    store.absent = 3
    upload_run.register_clusters(store, "run", [ad.NewCluster(index=0)])  # type: ignore[arg-type]
    assert store.registered == [[0]]
    store.absent = 4
    with pytest.raises(Unavailable, match="nobody answers"):
        send(store, 2, monkeypatch)


def test_an_error_that_is_none_of_urls_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    store.raises = IntegrityError("f0: changed while it was sent")
    with pytest.raises(IntegrityError):
        send(store, 40, monkeypatch)
    assert len(store.prepared) == 1


def test_clusters_are_told_of_in_messages_that_fit() -> None:
    store = Store()
    shard = ad.NewShard(file=FileSpec(path="x" * 80, size=SIZE, sha256="0" * 64).to_proto())
    small = [ad.NewCluster(index=i, shards=[shard] * 2) for i in range(10)]
    large = [ad.NewCluster(index=10 + i, shards=[shard] * 200) for i in range(3)]
    wordy = [ad.NewCluster(index=20 + i, example_documents=["x" * 1_500_000]) for i in range(2)]
    upload_run.register_clusters(store, "run", [*small, *large, *wordy])  # type: ignore[arg-type]
    assert store.registered == [[*range(10), 10], [11], [12, 20], [21]]
