"""What every object store must do, as one test suite for all backends, over real HTTP.

A test module subclasses `ObjectStoreContract` and gives a fixture `backend`.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.errors import AlreadyExists, Cancelled, CbtmError, IntegrityError, InvalidArgument, NotFound
from cbtm_common.files import FileSpec, hash_file
from cbtm_common.transfer import Transfer, UrlExpired
from cbtm_coordinator.storage import finish_upload, prepare_download, prepare_upload, verify
from tests.support.objects import IMPATIENT, PART, STUBBORN, TTL, Backend, exchanged, make_file
from tests.support.proxy import FaultProxy, FaultRates

TRICKY_KEYS = (
    "",
    "/etc/passwd",
    "../outside",
    "runs/../../outside",
    "runs/..",
    "runs//double",
    "runs/./here",
    "runs/end/",
    "runs\\..\\outside",
    "C:/outside",
    "runs/nul\0",
    "runs/new\nline",
    "runs/" + "x" * 300,
    "x/" * 600 + "x",
)


class ObjectStoreContract:
    """Subclasses give `backend`."""

    @pytest.fixture
    def transfer(self, backend: Backend) -> Iterator[Transfer]:
        with Transfer(base_url=backend.base_url, timeout=20, policy=IMPATIENT, parallel_parts=1) as transfer:
            yield transfer

    def put(self, backend: Backend, transfer: Transfer, file: FileSpec, source: Path) -> None:
        transfer.upload(prepare_upload(backend.store, file, ttl=TTL, part_size=PART), source)
        finish_upload(backend.store, file, part_size=PART)

    def download_until_refused(self, transfer: Transfer, download: pb.Download, destination: Path) -> None:
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            transfer.download(download, destination)

    def test_the_store_proves_that_it_works(self, backend: Backend) -> None:
        backend.store.check()

    @pytest.mark.parametrize("size", [0, 1, 300_000])
    def test_a_file_goes_there_and_back(self, backend: Backend, transfer: Transfer, tmp_path: Path, size: int) -> None:
        file = make_file(tmp_path / "model.safetensors", size)
        moved: list[int] = []
        transfer.upload(prepare_upload(backend.store, file, ttl=TTL), tmp_path / file.path, on_bytes=moved.append)
        verify(backend.store, file)
        assert sum(moved) == size
        moved.clear()
        transfer.download(prepare_download(backend.store, file, ttl=TTL), tmp_path / "back", on_bytes=moved.append)
        assert (tmp_path / "back").read_bytes() == (tmp_path / file.path).read_bytes()
        assert sum(moved) == size
        assert not (tmp_path / "back.part").exists()
        assert b"".join(backend.store.read(file.key)) == (tmp_path / file.path).read_bytes()

    def test_the_store_vouches_for_a_file_that_came_in_one_put(
        self, backend: Backend, transfer: Transfer, tmp_path: Path
    ) -> None:
        file = make_file(tmp_path / "one", 1000)
        self.put(backend, transfer, file, tmp_path / "one")
        stat = backend.store.stat(file.key)
        assert stat is not None
        assert (stat.size, stat.sha256) == (file.size, file.sha256)

    def test_names_with_spaces_and_other_alphabets_work(
        self, backend: Backend, transfer: Transfer, tmp_path: Path
    ) -> None:
        file = make_file(tmp_path / "x", 100, key="runs/run_1/tokenizer/été + 100% (neu)~é.json")
        self.put(backend, transfer, file, tmp_path / "x")
        verify(backend.store, file)
        transfer.download(prepare_download(backend.store, file, ttl=TTL), tmp_path / "back")
        assert [o.key for o in backend.store.list("runs/run_1/tokenizer/")] == [file.key]

    def test_a_broken_download_resumes_where_it_stopped(
        self, backend: Backend, transfer: Transfer, tmp_path: Path
    ) -> None:
        file = make_file(tmp_path / "file", 400_000)
        self.put(backend, transfer, file, tmp_path / "file")
        (tmp_path / "back.part").write_bytes((tmp_path / "file").read_bytes()[:300_000])
        moved: list[int] = []
        transfer.download(prepare_download(backend.store, file, ttl=TTL), tmp_path / "back", on_bytes=moved.append)
        assert sum(moved) == 100_000
        assert hash_file(tmp_path / "back") == (file.size, file.sha256)

    @pytest.mark.parametrize("leftover", [b"z" * 1000, b"z" * 400_000, b"z" * 400_001])
    def test_a_partial_download_of_something_else_is_thrown_away(
        self, backend: Backend, transfer: Transfer, tmp_path: Path, leftover: bytes
    ) -> None:
        file = make_file(tmp_path / "file", 400_000)
        self.put(backend, transfer, file, tmp_path / "file")
        (tmp_path / "back.part").write_bytes(leftover)
        transfer.download(prepare_download(backend.store, file, ttl=TTL), tmp_path / "back")
        assert hash_file(tmp_path / "back") == (file.size, file.sha256)

    def test_a_download_that_is_not_what_was_asked_for_is_refused(
        self, backend: Backend, transfer: Transfer, tmp_path: Path
    ) -> None:
        file = make_file(tmp_path / "file", 5000)
        self.put(backend, transfer, file, tmp_path / "file")
        download = prepare_download(backend.store, file, ttl=TTL)
        download.file.sha256 = hashlib.sha256(b"other").hexdigest()
        with pytest.raises(IntegrityError, match="SHA-256"):
            transfer.download(download, tmp_path / "back")
        download.file.sha256, download.file.size = file.sha256, 4000
        with pytest.raises(IntegrityError, match="more than 4000"):
            transfer.download(download, tmp_path / "back")
        assert not (tmp_path / "back").exists()

    def test_what_is_not_there_is_not_found(self, backend: Backend, transfer: Transfer, tmp_path: Path) -> None:
        file = FileSpec(path="x", key="runs/none/x", size=3, sha256="0" * 64)
        assert backend.store.stat(file.key) is None
        backend.store.delete(file.key)
        with pytest.raises(NotFound):
            list(backend.store.read(file.key))
        with pytest.raises(NotFound, match="nothing is stored"):
            verify(backend.store, file)
        with pytest.raises(NotFound):
            transfer.download(prepare_download(backend.store, file, ttl=TTL), tmp_path / "back")

    # In parts

    def test_parts_make_one_object(self, backend: Backend, tmp_path: Path) -> None:
        file = make_file(tmp_path / "big", 2 * PART + 12345)
        with Transfer(base_url=backend.base_url, parallel_parts=3) as transfer:
            upload = prepare_upload(backend.store, file, ttl=TTL, part_size=PART)
            assert [p.size for p in upload.multipart.parts] == [PART, PART, 12345]
            moved: list[int] = []
            transfer.upload(upload, tmp_path / "big", on_bytes=moved.append)
            assert sum(moved) == file.size
            assert backend.store.stat(file.key) is None
            finish_upload(backend.store, file, part_size=PART)
            finish_upload(backend.store, file, part_size=PART)
            verify(backend.store, file)
            assert prepare_upload(backend.store, file, ttl=TTL, part_size=PART).stored
            assert list(backend.store.list_multipart("runs/")) == []
            transfer.download(prepare_download(backend.store, file, ttl=TTL), tmp_path / "back")

    def test_an_upload_broken_off_in_the_middle_goes_on_with_the_missing_parts(
        self, backend: Backend, transfer: Transfer, tmp_path: Path
    ) -> None:
        file = make_file(tmp_path / "big", 3 * PART + 1)
        cancelled = threading.Event()
        moved = 0

        def break_in_the_third_part(count: int) -> None:
            nonlocal moved
            moved += count
            if moved > 2 * PART + 1_000_000:
                cancelled.set()

        first = prepare_upload(backend.store, file, ttl=TTL, part_size=PART)
        with pytest.raises(Cancelled):
            transfer.upload(first, tmp_path / "big", on_bytes=break_in_the_third_part, cancelled=cancelled)
        with pytest.raises(NotFound, match="2 of 4 parts"):
            finish_upload(backend.store, file, part_size=PART)
        second = prepare_upload(backend.store, file, ttl=TTL, part_size=PART)
        assert second.multipart.upload_id == first.multipart.upload_id
        assert [p.part_number for p in second.multipart.parts] == [3, 4]
        transfer.upload(second, tmp_path / "big")
        finish_upload(backend.store, file, part_size=PART)
        verify(backend.store, file)

    def test_a_link_that_breaks_again_and_again_only_slows_a_transfer_down(
        self, backend: Backend, tmp_path: Path
    ) -> None:
        file = make_file(tmp_path / "big", 3 * PART + 77)
        rates = FaultRates(error=0.4, cut_request=0.5, truncate=0.02)
        with FaultProxy(backend.port, seed=5, rates=rates) as proxy:
            store = backend.store_through(proxy.port)
            base_url = f"http://127.0.0.1:{proxy.port}"
            with Transfer(base_url=base_url, timeout=20, policy=STUBBORN) as transfer:
                transfer.upload(prepare_upload(store, file, ttl=TTL, part_size=PART), tmp_path / "big")
                finish_upload(backend.store, file, part_size=PART)
                verify(backend.store, file)
                transfer.download(prepare_download(store, file, ttl=TTL), tmp_path / "back")
            assert {"error", "cut_request", "truncate"} <= proxy.injected.keys()
        assert hash_file(tmp_path / "back") == (file.size, file.sha256)

    def test_wrong_bytes_in_parts_are_found_by_reading_back(
        self, backend: Backend, transfer: Transfer, tmp_path: Path
    ) -> None:
        file = make_file(tmp_path / "big", PART + 5)
        make_file(tmp_path / "other", PART + 5, seed=1)
        self.put(backend, transfer, file, tmp_path / "other")
        with pytest.raises(IntegrityError, match="SHA-256"):
            verify(backend.store, file)

    def test_a_part_that_is_longer_or_shorter_than_signed_is_refused(self, backend: Backend) -> None:
        upload_id = backend.store.create_multipart("runs/run_1/parts")
        signed = backend.store.sign_part("runs/run_1/parts", upload_id, number=1, size=100, ttl=TTL)
        for size in (99, 101):
            assert 400 <= backend.send(signed, b"x" * size).status_code < 500
        assert backend.store.list_parts("runs/run_1/parts", upload_id) == []

    def test_an_aborted_upload_takes_no_more_parts(self, backend: Backend, transfer: Transfer, tmp_path: Path) -> None:
        file = make_file(tmp_path / "big", PART + 5)
        upload = prepare_upload(backend.store, file, ttl=TTL, part_size=PART)
        (found,) = backend.store.list_multipart("runs/run_1/")
        assert (found.key, found.upload_id) == (file.key, upload.multipart.upload_id)
        backend.store.abort_multipart(file.key, found.upload_id)
        backend.store.abort_multipart(file.key, found.upload_id)
        assert list(backend.store.list_multipart("runs/run_1/")) == []
        with pytest.raises(UrlExpired):
            transfer.upload(upload, tmp_path / "big")
        with pytest.raises(NotFound):
            backend.store.list_parts(file.key, found.upload_id)
        with pytest.raises(NotFound):
            backend.store.complete_multipart(file.key, found.upload_id, [])

    def test_the_same_parts_sent_twice_are_one_object(
        self, backend: Backend, transfer: Transfer, tmp_path: Path
    ) -> None:
        file = make_file(tmp_path / "big", PART + 5)
        upload = prepare_upload(backend.store, file, ttl=TTL, part_size=PART)
        transfer.upload(upload, tmp_path / "big")
        transfer.upload(upload, tmp_path / "big")
        finish_upload(backend.store, file, part_size=PART)
        verify(backend.store, file)

    # What a signed URL does not allow

    def test_other_bytes_than_signed_are_refused(self, backend: Backend) -> None:
        signed = backend.store.sign_put("runs/r/x", size=5, sha256=hashlib.sha256(b"right").hexdigest(), ttl=TTL)
        assert backend.send(signed, b"wrong").status_code == 400
        assert backend.store.stat("runs/r/x") is None
        assert backend.send(signed, b"right").status_code == 200

    @pytest.mark.parametrize("content", [b"", b"righ", b"right!"])
    def test_another_length_than_signed_is_refused(self, backend: Backend, content: bytes) -> None:
        signed = backend.store.sign_put("runs/r/y", size=5, sha256=hashlib.sha256(b"right").hexdigest(), ttl=TTL)
        assert 400 <= backend.send(signed, content).status_code < 500
        assert backend.store.stat("runs/r/y") is None

    def test_a_source_that_changed_since_it_was_described_is_refused(
        self, backend: Backend, transfer: Transfer, tmp_path: Path
    ) -> None:
        file = make_file(tmp_path / "file", 1000)
        upload = prepare_upload(backend.store, file, ttl=TTL)
        make_file(tmp_path / "file", 1000, seed=1)
        with pytest.raises(IntegrityError):
            transfer.upload(upload, tmp_path / "file")
        (tmp_path / "file").write_bytes(b"shorter")
        with pytest.raises(IntegrityError, match="7 bytes"):
            transfer.upload(upload, tmp_path / "file")
        assert backend.store.stat(file.key) is None

    def test_an_expired_url_is_refused_and_says_so(self, backend: Backend, transfer: Transfer, tmp_path: Path) -> None:
        file = make_file(tmp_path / "file", 1000)
        self.put(backend, transfer, file, tmp_path / "file")
        download = prepare_download(backend.store, file, ttl=timedelta(seconds=1))
        with pytest.raises(UrlExpired, match="expired"):
            self.download_until_refused(transfer, download, tmp_path / "back")

    def test_a_changed_url_is_refused(self, backend: Backend) -> None:
        sha256 = hashlib.sha256(b"right").hexdigest()
        put = backend.store.sign_put("runs/r/z", size=5, sha256=sha256, ttl=TTL)
        assert backend.send(put, b"right").status_code == 200
        get = backend.store.sign_get("runs/r/z", ttl=TTL)
        assert backend.send(get).content == b"right"
        for name, value in parse_qsl(urlsplit(get.url).query):
            last = "0" if value[-1] != "0" else "1"
            response = backend.send(get, url=exchanged(get.url, name, value[:-1] + last))
            assert 400 <= response.status_code < 500, name
        assert backend.send(get, url=get.url.replace("runs/r/z", "runs/r/other")).status_code == 403
        assert backend.send(put, b"right", url=put.url.replace("runs/r/z", "runs/r/other")).status_code == 403
        assert backend.send(put, b"right", url=get.url).status_code == 403
        assert backend.send(get, method="DELETE").status_code in (403, 405)
        assert backend.send(get, url=urlsplit(get.url)._replace(query="").geturl()).status_code in (401, 403)
        assert backend.store.stat("runs/r/other") is None
        assert b"".join(backend.store.read("runs/r/z")) == b"right"

    @pytest.mark.parametrize("key", TRICKY_KEYS)
    def test_keys_that_lead_elsewhere_are_refused(self, backend: Backend, key: str) -> None:
        for call in (
            lambda: backend.store.sign_get(key, ttl=TTL),
            lambda: backend.store.sign_put(key, size=1, sha256="0" * 64, ttl=TTL),
            lambda: backend.store.create_multipart(key),
            lambda: backend.store.stat(key),
            lambda: backend.store.put_bytes(key, b"x"),
            lambda: backend.store.delete(key),
        ):
            with pytest.raises(InvalidArgument):
                call()

    # One key, several writers

    def test_the_same_file_again_is_not_sent_again(self, backend: Backend, transfer: Transfer, tmp_path: Path) -> None:
        file = make_file(tmp_path / "file", 1000)
        upload = prepare_upload(backend.store, file, ttl=TTL)
        transfer.upload(upload, tmp_path / "file")
        transfer.upload(upload, tmp_path / "file")
        again = prepare_upload(backend.store, file, ttl=TTL)
        assert again.stored
        assert not again.HasField("request")
        verify(backend.store, file)

    def test_another_file_in_its_place_is_refused_unless_replacing(
        self, backend: Backend, transfer: Transfer, tmp_path: Path
    ) -> None:
        file = make_file(tmp_path / "file", 1000)
        self.put(backend, transfer, file, tmp_path / "file")
        other = make_file(tmp_path / "file", 1000, seed=1, key=file.key)
        with pytest.raises(AlreadyExists, match="another file"):
            prepare_upload(backend.store, other, ttl=TTL)
        transfer.upload(prepare_upload(backend.store, other, ttl=TTL, replace=True), tmp_path / "file")
        verify(backend.store, other)

    def test_many_writers_of_one_key_leave_one_whole_object(
        self, backend: Backend, transfer: Transfer, tmp_path: Path
    ) -> None:
        files = [make_file(tmp_path / f"{n}", 200_000, seed=n, key="runs/r/contended") for n in range(8)]
        uploads = [prepare_upload(backend.store, file, ttl=TTL) for file in files]

        def send(upload: pb.Upload, source: Path) -> None:
            with contextlib.suppress(CbtmError):
                transfer.upload(upload, source)

        threads = [threading.Thread(target=send, args=(u, tmp_path / u.file.path)) for u in uploads]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stored = hashlib.sha256(b"".join(backend.store.read("runs/r/contended"))).hexdigest()
        (winner,) = [file for file in files if file.sha256 == stored]
        verify(backend.store, winner)

    # The coordinator's own

    def test_verify_catches_a_wrong_object(self, backend: Backend) -> None:
        right = FileSpec(path="x", key="runs/r/v", size=5, sha256=hashlib.sha256(b"right").hexdigest())
        backend.store.put_bytes(right.key, b"wrong")
        with pytest.raises(IntegrityError, match="SHA-256"):
            verify(backend.store, right)
        backend.store.put_bytes(right.key, b"too long")
        with pytest.raises(IntegrityError, match="8 bytes"):
            verify(backend.store, right)
        backend.store.put_bytes(right.key, b"right")
        verify(backend.store, right)

    def test_listing_gives_what_starts_with_the_prefix(self, backend: Backend) -> None:
        keys = ["a/b", "a-b", "a/c/d", "ab/x", "a/c.json", "b"]
        for key in keys:
            backend.store.put_bytes(f"scratch/{key}", key.encode())
        assert {o.key for o in backend.store.list("scratch/")} == {f"scratch/{key}" for key in keys}
        assert {o.key for o in backend.store.list("scratch/a/c")} == {"scratch/a/c.json", "scratch/a/c/d"}
        assert list(backend.store.list("scratch/none/")) == []
        listed = {o.key: o for o in backend.store.list("scratch/")}
        assert listed["scratch/a/c/d"].size == 5
        assert abs(listed["scratch/b"].modified.timestamp() - time.time()) < 60
        for key in keys:
            backend.store.delete(f"scratch/{key}")
        assert list(backend.store.list("scratch/")) == []
