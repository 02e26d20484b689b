"""The cache: what enters, what is trusted, what is dropped, and several users of one directory."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.cache import ContentCache
from cbtm_common.errors import IntegrityError, InvalidArgument, NotFound, ResourceExhausted
from cbtm_common.files import FileSpec
from cbtm_common.transfer import Transfer, UrlExpired


class Store:
    """Contents by key, behind HTTP; counts what it is asked for."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.prepared: list[list[str]] = []
        self.expired: list[int] = []
        self.transfer = Transfer(base_url="http://store", transport=httpx.MockTransport(self._serve))

    def add(self, path: str, content: bytes) -> FileSpec:
        key = f"k/{path}"
        self.contents[key] = content
        return FileSpec(path=path, key=key, size=len(content), sha256=hashlib.sha256(content).hexdigest())

    def prepare(self, keys: list[str]) -> Sequence[pb.Download]:
        self.prepared.append(keys)
        request = [pb.SignedRequest(method="GET", url=f"/{key}") for key in keys]
        return [pb.Download(file=pb.FileSpec(key=k), request=r) for k, r in zip(keys, request, strict=True)]

    def _serve(self, request: httpx.Request) -> httpx.Response:
        self.requests[request.url.path[1:]] += 1
        if self.expired and self.expired.pop():
            return httpx.Response(403)
        start = int(request.headers.get("range", "bytes=0-")[6:-1])
        content = self.contents[request.url.path[1:]]
        if not start:
            return httpx.Response(200, stream=httpx.ByteStream(content))
        rest = httpx.ByteStream(content[start:])
        return httpx.Response(206, stream=rest, headers={"content-range": f"bytes {start}-"})


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.transfer.close()


@pytest.fixture
def open_cache(tmp_path: Path) -> Iterator[Callable[..., ContentCache]]:
    opened: list[ContentCache] = []

    def open_one(max_bytes: int | None = None) -> ContentCache:
        opened.append(ContentCache(tmp_path / "cache", max_bytes))
        return opened[-1]

    yield open_one
    for cache in opened:
        cache.close()


OpenCache = Callable[..., ContentCache]


def test_a_file_is_fetched_once(store: Store, open_cache: OpenCache) -> None:
    file = store.add("a", b"content")
    for cache in (open_cache(), open_cache()):
        path = cache.fetch(file, store.prepare, store.transfer)
        assert path.read_bytes() == b"content"
        assert cache.fetch_all([file], store.prepare, store.transfer) == {"a": path}
    assert store.requests["k/a"] == 1


def test_two_names_of_one_content_are_fetched_once(store: Store, open_cache: OpenCache) -> None:
    files = [store.add("a", b"same"), store.add("b/a", b"same"), store.add("c", b"other")]
    paths = open_cache().fetch_all(files, store.prepare, store.transfer)
    assert list(paths) == ["a", "b/a", "c"]
    assert paths["a"] == paths["b/a"]
    assert store.requests.total() == 2


def test_bytes_that_are_not_the_file_never_enter(store: Store, open_cache: OpenCache) -> None:
    file = store.add("a", b"right")
    store.contents["k/a"] = b"wrong"
    cache = open_cache()
    with pytest.raises(IntegrityError):
        cache.fetch(file, store.prepare, store.transfer)
    assert not cache.path_of(file.sha256).exists()


@pytest.mark.parametrize("damage", [b"wrong", b"short"[:3]])
def test_a_file_that_changed_is_fetched_again(store: Store, open_cache: OpenCache, damage: bytes) -> None:
    file = store.add("a", b"right")
    cache = open_cache()
    for other in (cache, open_cache()):
        path = other.fetch(file, store.prepare, store.transfer)
        path.chmod(0o644)
        path.write_bytes(damage)
        # A clock too coarse to show the change would hide it.
        os.utime(path, ns=(0, 0))
        assert other.fetch(file, store.prepare, store.transfer).read_bytes() == b"right"


def test_a_broken_download_goes_on(store: Store, open_cache: OpenCache) -> None:
    file = store.add("a", b"0123456789")
    cache = open_cache()
    part = cache.path_of(file.sha256).with_suffix(".part")
    part.parent.mkdir()
    part.write_bytes(b"01234")
    moved: list[int] = []
    cache.fetch(file, store.prepare, store.transfer, on_bytes=moved.append)
    assert sum(moved) == 5


def test_urls_that_expire_under_way_are_asked_for_again(store: Store, open_cache: OpenCache) -> None:
    files = [store.add(str(n), bytes([n])) for n in range(5)]
    store.expired = [0, 0, 1, 0, 0]
    open_cache().fetch_all(files, store.prepare, store.transfer)
    assert [len(keys) for keys in store.prepared] == [5, 3]


def test_urls_that_are_always_expired_are_given_up(store: Store, open_cache: OpenCache) -> None:
    file = store.add("a", b"x")
    store.expired = [1] * 100
    with pytest.raises(UrlExpired):
        open_cache().fetch(file, store.prepare, store.transfer)
    assert len(store.prepared) == 4


def test_many_files_are_prepared_in_batches(store: Store, open_cache: OpenCache) -> None:
    files = [store.add(str(n), str(n).encode()) for n in range(70)]
    open_cache().fetch_all(files, store.prepare, store.transfer)
    assert [len(keys) for keys in store.prepared] == [64, 6]


def test_a_key_that_the_coordinator_does_not_sign_is_named(store: Store, open_cache: OpenCache) -> None:
    file = store.add("a", b"x")
    with pytest.raises(NotFound, match="k/a"):
        open_cache().fetch(file, lambda _: [], store.transfer)


def test_users_at_the_same_time_fetch_a_file_once(store: Store, open_cache: OpenCache) -> None:
    files = [store.add(str(n), bytes([n]) * 1000) for n in range(4)]
    caches = [open_cache() for _ in range(3)]
    threads = [
        threading.Thread(target=cache.fetch_all, args=(files, store.prepare, store.transfer)) for cache in caches * 2
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(store.requests.values()) == {1}


# Room


def test_the_least_recently_used_go_first_and_only_what_nobody_uses(store: Store, open_cache: OpenCache) -> None:
    cache, other = open_cache(max_bytes=300), open_cache(max_bytes=300)
    a, b, c = (store.add(name, name.encode() * 100) for name in "abc")
    for user, file in ((cache, a), (cache, b), (other, c), (cache, a)):
        user.fetch(file, store.prepare, store.transfer)
    cache.release([a, b])
    cache.release([a])
    cache.fetch(store.add("d", b"d" * 100), store.prepare, store.transfer)
    assert {f.path for f in (a, b, c) if cache.path_of(f.sha256).exists()} == {"a", "c"}
    cache.fetch(store.add("e", b"e" * 100), store.prepare, store.transfer)
    cache.fetch(store.add("f", b"f" * 100), store.prepare, store.transfer)
    # Only what is in use is left, more than `max_bytes`.
    assert {f.path for f in (a, b, c) if cache.path_of(f.sha256).exists()} == {"c"}


def test_what_a_dead_process_used_may_be_dropped(store: Store, open_cache: OpenCache, tmp_path: Path) -> None:
    file = store.add("a", b"a" * 100)
    dead = open_cache()
    dead.fetch(file, store.prepare, store.transfer)
    # A killed process lets go of its lock and leaves its files.
    dead._alive.release()
    cache = open_cache(max_bytes=100)
    cache.fetch(store.add("b", b"b" * 100), store.prepare, store.transfer)
    assert not cache.path_of(file.sha256).exists()
    assert len(list((tmp_path / "cache" / "pins").glob("*.lock"))) == 1


def test_a_disk_without_room_is_told_with_numbers(
    store: Store, open_cache: OpenCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 950, 50))
    cache = open_cache()
    with pytest.raises(ResourceExhausted, match="100 bytes are needed and 50 are free"):
        cache.fetch(store.add("a", b"a" * 100), store.prepare, store.transfer)
    assert store.requests.total() == 0


# Directories


def test_a_set_of_files_is_laid_out_by_path(store: Store, open_cache: OpenCache, tmp_path: Path) -> None:
    files = [store.add("config.json", b"{}"), store.add("a/model.safetensors", b"weights")]
    cache = open_cache()
    target = tmp_path / "model"
    for _ in range(2):
        assert cache.materialize(files, target, store.prepare, store.transfer) == target
    assert (target / "config.json").read_bytes() == b"{}"
    assert (target / "a/model.safetensors").samefile(cache.path_of(files[1].sha256))
    assert sorted(p.name for p in target.iterdir()) == ["a", "config.json"]
    other = store.add("config.json", b'{"new": 1}')
    cache.materialize([other], target, store.prepare, store.transfer)
    assert (target / "config.json").read_bytes() == b'{"new": 1}'


def test_where_links_cannot_be_made_files_are_copied(
    store: Store, open_cache: OpenCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError("cross-device link")

    monkeypatch.setattr(os, "link", no_links)
    files = [store.add("a", b"content")]
    open_cache().materialize(files, tmp_path / "model", store.prepare, store.transfer)
    assert (tmp_path / "model" / "a").read_bytes() == b"content"


def test_a_set_cannot_write_outside_its_directory(store: Store, open_cache: OpenCache, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument):
        open_cache().materialize([store.add("../x", b"x")], tmp_path / "model", store.prepare, store.transfer)
    assert not (tmp_path / "x").exists()
