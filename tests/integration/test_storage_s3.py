"""The S3 backend against a real server: the contract, and what is special to it."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
import uuid
from datetime import timedelta
from urllib.parse import parse_qsl, urlsplit

import pytest

from cbtm_common.errors import IntegrityError, InvalidArgument, PermissionDenied, Unavailable
from cbtm_common.files import FileSpec
from cbtm_coordinator.storage import S3Config, S3Store, StorageConfig, open_object_store, prepare_upload, verify
from cbtm_coordinator.storage.s3 import _make_client
from tests.support.object_contract import ObjectStoreContract
from tests.support.objects import Backend
from tests.support.seaweed import Seaweed, seaweed

pytestmark = pytest.mark.integration

__all__ = ["seaweed"]


@pytest.fixture(scope="module")
def bucket(seaweed: Seaweed) -> str:
    # One for all tests, which differ by prefix: each bucket takes volumes of the server's for itself.
    return seaweed.make_bucket("cbtm-storage")


@pytest.fixture
def config(seaweed: Seaweed, bucket: str, monkeypatch: pytest.MonkeyPatch) -> S3Config:
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    return S3Config(bucket=bucket, prefix=f"some/{uuid.uuid4().hex}", endpoint_url=seaweed.endpoint_url)


@pytest.fixture
def backend(config: S3Config, seaweed: Seaweed) -> Backend:
    def through(port: int) -> S3Store:
        return S3Store(
            S3Config(
                bucket=config.bucket,
                prefix=config.prefix,
                endpoint_url=config.endpoint_url,
                public_endpoint_url=f"http://127.0.0.1:{port}",
            )
        )

    store = open_object_store(
        StorageConfig(location=f"s3://{config.bucket}/{config.prefix}", endpoint_url=config.endpoint_url)
    )
    return Backend(store=store, base_url="", port=seaweed.port, store_through=through)


class TestS3Store(ObjectStoreContract):
    pass


def test_objects_lie_under_the_prefix(config: S3Config, seaweed: Seaweed) -> None:
    S3Store(config).put_bytes("runs/x", b"x")
    listed = seaweed.client().list_objects_v2(Bucket=config.bucket, Prefix=config.prefix)["Contents"]
    assert [o["Key"] for o in listed] == [f"{config.prefix}/runs/x"]


def test_a_store_that_does_not_check_digests_is_not_believed(config: S3Config, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, gullible = S3Store(config), S3Store(config)
    honest.put_bytes("runs/x", b"right")
    digest = hashlib.sha256(b"right").hexdigest()
    stat = honest.stat("runs/x")
    assert stat is not None
    assert stat.sha256 == digest

    real = gullible._client.put_object

    def accept_anything(*, ChecksumSHA256: str, **parameters: object) -> object:
        return real(**parameters)

    monkeypatch.setattr(gullible._client, "put_object", accept_anything)
    stat = gullible.stat("runs/x")
    assert stat is not None
    assert stat.sha256 is None
    assert [o.key for o in honest.list("scratch/")] == []


def test_a_missing_bucket_is_told_with_its_remedy(config: S3Config) -> None:
    store = S3Store(S3Config(bucket="there-is-none", endpoint_url=config.endpoint_url))
    with pytest.raises(InvalidArgument, match=r"there-is-none.*create it first"):
        store.check()


def test_a_wrong_secret_is_told(config: S3Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(PermissionDenied, match=config.bucket):
        S3Store(config).check()


def test_missing_credentials_are_told(config: S3Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(PermissionDenied, match="AWS_ACCESS_KEY_ID"):
        S3Store(config).check()


def test_a_store_that_cannot_be_reached_is_unavailable(config: S3Config) -> None:
    store = S3Store(S3Config(bucket=config.bucket, endpoint_url="http://127.0.0.1:9"))
    with pytest.raises(Unavailable):
        store.check()


def test_an_object_with_other_bytes_than_its_digest_is_refused_by_the_store(config: S3Config) -> None:
    with pytest.raises(IntegrityError):
        S3Store(config)._call("put_object", Key="x", Body=b"right", ChecksumSHA256="A" * 43 + "=")


def test_length_and_digest_are_part_of_the_signature_and_urls_are_for_the_public_endpoint(config: S3Config) -> None:
    public = S3Config(bucket="b", endpoint_url=config.endpoint_url, public_endpoint_url="https://s3.example")
    store = S3Store(public)
    put = store.sign_put("k", size=5, sha256="ab" * 32, ttl=timedelta(minutes=5))
    assert put.url.startswith("https://s3.example/b/k?")
    signed = dict(parse_qsl(urlsplit(put.url).query))
    assert signed["X-Amz-SignedHeaders"] == "content-length;host;x-amz-checksum-sha256"
    assert signed["X-Amz-Expires"] == "300"
    part = store.sign_part("k", "upload", number=2, size=5, ttl=timedelta(minutes=5))
    assert dict(parse_qsl(urlsplit(part.url).query))["X-Amz-SignedHeaders"] == "content-length;host"


def test_urls_of_virtual_hosts_name_the_bucket_in_the_host(config: S3Config) -> None:
    store = S3Store(S3Config(bucket="bucket", endpoint_url="https://s3.example", path_style=False))
    assert store.sign_get("k", ttl=timedelta(minutes=5)).url.startswith("https://bucket.s3.example/k?")


@pytest.mark.parametrize(
    "cut",
    [
        pytest.param({}, id="before-the-length"),
        pytest.param({"ContentLength": 1}, id="in-the-length"),
        pytest.param({"ContentLength": 10, "ChecksumSHA256": "47DEQpj8HBSa"}, id="in-the-digest-at-four"),
        pytest.param({"ContentLength": 10, "ChecksumSHA256": "47DEQpj8H"}, id="in-the-digest"),
    ],
)
def test_an_answer_that_a_broken_connection_cut_short_deletes_no_good_object(
    config: S3Config, monkeypatch: pytest.MonkeyPatch, cut: dict[str, object]
) -> None:
    store, data = S3Store(config), b"0123456789"
    file = FileSpec(path="x", key="runs/x", size=len(data), sha256=hashlib.sha256(data).hexdigest())
    store.put_bytes(file.key, data)
    verify(store, file)
    heads, real = [cut], store._call
    monkeypatch.setattr(
        store, "_call", lambda name, **given: heads.pop() if heads and name == "head_object" else real(name, **given)
    )
    # Either it says that it could not find out, or it finds out.
    with contextlib.suppress(Unavailable):
        verify(store, file)
    assert not heads
    heads.append(cut)
    with contextlib.suppress(Unavailable):
        assert prepare_upload(store, file, ttl=timedelta(minutes=1), replace=True).stored
    assert store.stat(file.key) is not None


def test_an_answer_that_breaks_off_in_a_header_is_an_outage(config: S3Config) -> None:
    store = S3Store(config)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nLast-Modified: Wed, 25 Nov 2026 23:\r\n\r\n"
                )

        thread = threading.Thread(target=answer)
        thread.start()
        store._client = _make_client(config, f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(Unavailable, match="answer cannot be read"):
            store.stat("some/key")
        thread.join()
