"""Signed URLs, keys, ranges and the embedded folder, without a server."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import pytest

from cbtm_common.errors import (
    AlreadyExists,
    IntegrityError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from cbtm_common.files import FileSpec
from cbtm_coordinator.storage import (
    LocalStore,
    StorageConfig,
    UrlSigner,
    check_key,
    finish_upload,
    load_or_create_key,
    open_object_store,
    prepare_upload,
    verify,
)
from cbtm_coordinator.storage.base import MAX_PARTS, part_sizes
from cbtm_coordinator.storage.http_app import parse_range
from cbtm_coordinator.storage.signing import Grant

MINUTE = timedelta(minutes=1)
KEY = b"k" * 32


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def signer(clock: Clock) -> UrlSigner:
    return UrlSigner(KEY, clock=clock)


@pytest.fixture
def store(tmp_path: Path, signer: UrlSigner) -> LocalStore:
    return LocalStore(tmp_path / "store", signer)


PUT = Grant(method="PUT", key="runs/r/x", size=5, sha256="ab" * 32)
PART = Grant(method="PUT", key="runs/r/x", size=5, upload_id="0" * 32, part=3)
GET = Grant(method="GET", key="runs/r/x")


def check(signer: UrlSigner, method: str, url: str) -> Grant:
    parts = urlsplit(url)
    return signer.check(method, parts.path, parts.query)


# Signatures


@pytest.mark.parametrize("grant", [PUT, PART, GET])
def test_what_was_signed_is_granted(signer: UrlSigner, grant: Grant) -> None:
    assert check(signer, grant.method, signer.sign(grant, ttl=MINUTE).url) == grant


def test_a_get_may_be_a_head(signer: UrlSigner) -> None:
    assert check(signer, "HEAD", signer.sign(GET, ttl=MINUTE).url) == GET


@pytest.mark.parametrize(("grant", "method"), [(PUT, "GET"), (PUT, "HEAD"), (GET, "PUT"), (GET, "DELETE")])
def test_another_method_is_refused(signer: UrlSigner, grant: Grant, method: str) -> None:
    with pytest.raises(PermissionDenied):
        check(signer, method, signer.sign(grant, ttl=MINUTE).url)


@pytest.mark.parametrize(
    "change",
    [
        ("size=5", "size=6"),
        ("sha256=ab", "sha256=ac"),
        ("expires=", "expires=9"),
        ("runs/r/x", "runs/r/y"),
        ("size=5&", ""),
        ("size=5", "size=5&size=6"),
        ("size=5", "size=5&part=1"),
        ("size=5", "size=5&other=1"),
        ("signature=", "signature=0"),
    ],
)
def test_a_changed_url_is_refused(signer: UrlSigner, change: tuple[str, str]) -> None:
    url = signer.sign(PUT, ttl=MINUTE).url
    assert url.replace(*change) != url
    with pytest.raises(PermissionDenied):
        check(signer, "PUT", url.replace(*change))


def test_a_value_cannot_swallow_the_next_line_of_what_is_signed(signer: UrlSigner) -> None:
    """The signed text would be the same, and the length no longer bound."""
    signed = dict(pair.split("=") for pair in urlsplit(signer.sign(PUT, ttl=MINUTE).url).query.split("&"))
    smuggled = {
        "expires": signed["expires"],
        "sha256": f"{signed['sha256']}\nsize={signed['size']}",
        "signature": signed["signature"],
    }
    with pytest.raises(PermissionDenied):
        signer.check("PUT", "/v1/objects/runs/r/x", urlencode(smuggled))


def test_no_signature_is_another_error_than_a_wrong_one(signer: UrlSigner) -> None:
    with pytest.raises(Unauthenticated):
        signer.check("GET", "/v1/objects/runs/r/x", "expires=1")


def test_a_url_is_good_until_its_expiry_and_not_a_second_longer(signer: UrlSigner, clock: Clock) -> None:
    signed = signer.sign(GET, ttl=MINUTE)
    assert signed.expires == clock.now + MINUTE
    clock.now += MINUTE - timedelta(seconds=1)
    check(signer, "GET", signed.url)
    clock.now += timedelta(seconds=1)
    with pytest.raises(PermissionDenied, match="expired"):
        check(signer, "GET", signed.url)


def test_another_key_signs_nothing_here(signer: UrlSigner, clock: Clock) -> None:
    with pytest.raises(PermissionDenied):
        check(signer, "GET", UrlSigner(b"l" * 32, clock=clock).sign(GET, ttl=MINUTE).url)


def test_a_short_key_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="signing_key"):
        UrlSigner(b"short")


@pytest.mark.parametrize(
    "path", ["runs%2Fr%2Fx", "runs/r/%78", "runs//r/x", "./runs/r/x", "runs/r/../r/x", "runs/r/x/"]
)
def test_a_key_has_one_spelling(signer: UrlSigner, path: str) -> None:
    query = urlsplit(signer.sign(GET, ttl=MINUTE).url).query
    with pytest.raises(InvalidArgument):
        signer.check("GET", f"/v1/objects/{path}", query)


def test_keys_of_any_alphabet_are_signed_and_found_again(signer: UrlSigner) -> None:
    grant = Grant(method="GET", key="runs/r/été ~ 100%+&=?#.json")
    assert check(signer, "GET", signer.sign(grant, ttl=MINUTE).url) == grant


def test_the_signing_key_is_made_once_and_is_for_its_owner_alone(tmp_path: Path) -> None:
    keys: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: keys.append(load_or_create_key(tmp_path / "signing.key"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(keys) == 8
    assert len(set(keys)) == 1
    assert len(keys[0]) == 32
    assert stat.S_IMODE((tmp_path / "signing.key").stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [tmp_path / "signing.key"]


def test_a_signing_key_that_is_not_one_is_told(tmp_path: Path) -> None:
    (tmp_path / "signing.key").write_text("not hexadecimal")
    with pytest.raises(InvalidArgument, match="signing_key"):
        load_or_create_key(tmp_path / "signing.key")


# Keys, parts, ranges, configuration


@pytest.mark.parametrize(
    "key", ["", "/a", "../a", "a/../b", "a//b", "a\\b", "a:b", "a\nb", "a\x7f", "x" * 256, "\ud800"]
)
def test_what_is_not_a_key_is_refused(key: str) -> None:
    with pytest.raises(InvalidArgument):
        check_key(key)


@pytest.mark.parametrize(
    ("size", "sizes"), [(0, []), (1, [1]), (10, [10]), (11, [10, 1]), (20, [10, 10]), (25, [10, 10, 5])]
)
def test_parts_cover_the_file(size: int, sizes: list[int]) -> None:
    assert part_sizes(size, 10) == sizes


def test_parts_grow_when_there_would_be_too_many() -> None:
    sizes = part_sizes(10 * MAX_PARTS * 10 + 1, 10)
    assert len(sizes) <= MAX_PARTS
    assert sum(sizes) == 10 * MAX_PARTS * 10 + 1


@pytest.mark.parametrize(
    ("header", "span"),
    [
        ("", None),
        ("bytes=0-", (0, 10)),
        ("bytes=3-", (3, 10)),
        ("bytes=3-3", (3, 4)),
        ("bytes=3-99", (3, 10)),
        ("bytes=-4", (6, 10)),
        ("bytes=-99", (0, 10)),
        ("bytes=-0", (10, 10)),
        ("bytes=10-", (10, 10)),
        ("bytes=99-", (99, 10)),
        ("bytes=4-3", None),
        ("bytes=-", None),
        ("bytes=1-2,4-5", None),
        ("items=1-2", None),
        ("bytes=a-b", None),
    ],
)
def test_ranges(header: str, span: tuple[int, int] | None) -> None:
    assert parse_range(header, 10) == span


@pytest.mark.parametrize("location", ["", "local:", "somewhere", "s3:", "s3://", "s3:///prefix", "http://x/y"])
def test_a_location_that_is_none_is_told(location: str) -> None:
    with pytest.raises(InvalidArgument, match="object_store"):
        open_object_store(StorageConfig(location=location, signing_key=KEY))


def test_a_local_location_makes_its_folder(tmp_path: Path) -> None:
    store = open_object_store(StorageConfig(location=f"local:{tmp_path}/a/b", signing_key=KEY))
    store.check()
    assert (tmp_path / "a" / "b").is_dir()


# The folder


def spec(key: str, content: bytes) -> FileSpec:
    return FileSpec(path=key.rpartition("/")[2], key=key, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def receive(store: LocalStore, file: FileSpec, content: bytes) -> None:
    with store.receive(file.size) as incoming:
        incoming.write(content)
        store.accept(incoming, Grant(method="PUT", key=file.key, size=file.size, sha256=file.sha256))


def test_an_object_is_never_replaced_by_a_signed_put(store: LocalStore) -> None:
    receive(store, spec("runs/x", b"first"), b"first")
    receive(store, spec("runs/x", b"first"), b"first")
    with pytest.raises(AlreadyExists):
        receive(store, spec("runs/x", b"other"), b"other")
    verify(store, spec("runs/x", b"first"))
    assert os.listdir(store.folder / "incoming") == []


def test_bytes_that_were_not_signed_leave_nothing(store: LocalStore) -> None:
    with pytest.raises(IntegrityError):
        receive(store, spec("runs/x", b"right"), b"wrong")
    with pytest.raises(InvalidArgument, match="more than"):
        receive(store, spec("runs/x", b"right"), b"right!")
    with pytest.raises(InvalidArgument, match="4 bytes came"):
        receive(store, spec("runs/x", b"right"), b"righ")
    assert store.stat("runs/x") is None
    assert os.listdir(store.folder / "incoming") == []


def test_an_object_whose_digest_was_lost_is_hashed(store: LocalStore) -> None:
    file = spec("runs/x", b"right")
    receive(store, file, b"right")
    store._digest_path("runs/x").unlink()
    found = store.stat("runs/x")
    assert found is not None
    assert found.sha256 is None
    verify(store, file)
    with pytest.raises(IntegrityError):
        verify(store, spec("runs/x", b"wrong"))


def test_an_object_and_a_folder_of_one_name_are_told_apart(store: LocalStore) -> None:
    store.put_bytes("runs/x", b"object")
    with pytest.raises(AlreadyExists, match="name of a folder"):
        store.put_bytes("runs/x/y", b"under it")
    with pytest.raises(AlreadyExists):
        receive(store, spec("runs", b"12345"), b"12345")
    assert store.stat("runs") is None
    with pytest.raises(NotFound):
        store.path_of("runs")


def test_deleting_leaves_no_empty_folders(store: LocalStore) -> None:
    store.put_bytes("runs/r/a/x", b"x")
    store.put_bytes("runs/r/b/y", b"y")
    store.delete("runs/r/a")
    store.delete("runs/r/a/x")
    assert [o.key for o in store.list("runs/")] == ["runs/r/b/y"]
    assert not (store.folder / "objects/runs/r/a").exists()
    store.delete("runs/r/b/y")
    assert os.listdir(store.folder / "objects") == []
    assert [f for _, _, files in os.walk(store.folder / "digests") for f in files] == []


def test_files_that_dead_writers_left_go_when_the_store_opens(store: LocalStore, signer: UrlSigner) -> None:
    for name, age in (("old", 2 * 86400), ("new", 60)):
        path = store.folder / "incoming" / name
        path.write_bytes(b"x")
        then = path.stat().st_mtime - age
        os.utime(path, (then, then))
    LocalStore(store.folder, signer)
    assert os.listdir(store.folder / "incoming") == ["new"]


def test_a_folder_that_cannot_be_written_is_told(store: LocalStore) -> None:
    (store.folder / "incoming").rmdir()
    with pytest.raises(Unavailable, match="cannot be written"):
        store.check()


@pytest.mark.parametrize("upload_id", ["", "..", "0" * 31, "0" * 32, "../../objects"])
def test_an_upload_that_is_not_open_is_not_found(store: LocalStore, upload_id: str) -> None:
    with pytest.raises(NotFound):
        store.list_parts("runs/x", upload_id)


def test_an_upload_belongs_to_its_key(store: LocalStore) -> None:
    upload_id = store.create_multipart("runs/x")
    with pytest.raises(NotFound):
        store.list_parts("runs/y", upload_id)
    store.abort_multipart("runs/y", upload_id)
    assert [u.key for u in store.list_multipart("runs/")] == ["runs/x"]


def test_a_second_coordinator_may_complete_the_same_upload(store: LocalStore, signer: UrlSigner) -> None:
    content = b"0123456789"
    file = spec("runs/x", content)
    upload = prepare_upload(store, file, ttl=MINUTE, part_size=4)
    for part in upload.multipart.parts:
        with store.receive(part.size) as incoming:
            start = (part.part_number - 1) * 4
            incoming.write(content[start : start + part.size])
            grant = Grant(
                method="PUT",
                key=file.key,
                size=part.size,
                upload_id=upload.multipart.upload_id,
                part=part.part_number,
            )
            store.accept(incoming, grant)
    other = LocalStore(store.folder, signer)
    threads = [threading.Thread(target=finish_upload, args=(s, file), kwargs={"part_size": 4}) for s in (store, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    verify(store, file)
    assert list(store.list_multipart("")) == []
