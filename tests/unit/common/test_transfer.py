"""Transfers against servers that misbehave, through httpx's seam: no sockets."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.errors import (
    AlreadyExists,
    Cancelled,
    IntegrityError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from cbtm_common.rpc import RetryPolicy
from cbtm_common.transfer import Transfer, UrlExpired

CONTENT = bytes(range(256)) * 100
QUICK = RetryPolicy(attempts=3, initial=0.0, maximum=0.0)
Handler = Callable[[httpx.Request], httpx.Response]


def transfer_to(handler: Handler, *, base_url: str = "http://store", policy: RetryPolicy = QUICK) -> Transfer:
    return Transfer(base_url=base_url, policy=policy, transport=httpx.MockTransport(handler))


def download_of(content: bytes = CONTENT, url: str = "/object?x=1") -> pb.Download:
    file = pb.FileSpec(path="f", key="k", size=len(content), sha256=hashlib.sha256(content).hexdigest())
    return pb.Download(file=file, request=pb.SignedRequest(method="GET", url=url))


def upload_of(content: bytes = CONTENT) -> pb.Upload:
    file = pb.FileSpec(path="f", key="k", size=len(content), sha256=hashlib.sha256(content).hexdigest())
    return pb.Upload(file=file, request=pb.SignedRequest(method="PUT", url="/object", headers={"x-signed": "yes"}))


class Answers:
    """Plays its answers one after the other; the last one again and again."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def answer(content: bytes, status: int = 200, **headers: str) -> httpx.Response:
    """An answer that streams, as a real one does."""
    named = {k.replace("_", "-"): v for k, v in headers.items()}
    return httpx.Response(status, stream=httpx.ByteStream(content), headers=named)


def broken_after(content: bytes, status: int = 200, **headers: str) -> httpx.Response:
    """An answer whose connection breaks after `content`."""

    class Stream(httpx.SyncByteStream):
        def __iter__(self):  # type: ignore[no-untyped-def]
            yield content
            raise httpx.ReadError("reset")

    return httpx.Response(status, stream=Stream(), headers={k.replace("_", "-"): v for k, v in headers.items()})


@pytest.mark.parametrize(
    "failure", [httpx.Response(503), httpx.Response(429), httpx.ConnectError("no"), httpx.ReadTimeout("stalled")]
)
def test_failures_that_may_pass_are_tried_again(tmp_path: Path, failure: httpx.Response | Exception) -> None:
    answers = Answers(failure, failure, answer(CONTENT))
    transfer_to(answers).download(download_of(), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert len(answers.requests) == 3


def test_attempts_without_progress_come_to_an_end(tmp_path: Path) -> None:
    answers = Answers(httpx.ConnectError("no route"))
    with pytest.raises(Unavailable, match="no route"):
        transfer_to(answers).download(download_of(), tmp_path / "f")
    assert len(answers.requests) == QUICK.attempts
    (tmp_path / "f").write_bytes(CONTENT)
    with pytest.raises(Unavailable):
        transfer_to(answers).upload(upload_of(), tmp_path / "f")


def test_a_download_goes_on_as_long_as_each_attempt_brings_bytes(tmp_path: Path) -> None:
    starts: list[int] = []

    def server(request: httpx.Request) -> httpx.Response:
        start = int(request.headers.get("range", "bytes=0-")[6:-1])
        starts.append(start)
        piece = CONTENT[start : start + 1000]
        if not start:
            return broken_after(piece)
        return broken_after(piece, 206, content_range=f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")

    moved: list[int] = []
    transfer_to(server).download(download_of(), tmp_path / "f", on_bytes=moved.append)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert starts == list(range(0, len(CONTENT), 1000))
    assert sum(moved) == len(CONTENT)


def test_a_server_that_ignores_ranges_sends_all_again(tmp_path: Path) -> None:
    answers = Answers(broken_after(CONTENT[:5000]), answer(CONTENT))
    transfer_to(answers).download(download_of(), tmp_path / "f")
    assert answers.requests[1].headers["range"] == "bytes=5000-"
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_server_that_answers_another_range_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT[:10])
    answers = Answers(answer(CONTENT[5:], 206, content_range="bytes 5-99/100"))
    with pytest.raises(IntegrityError, match="another range"):
        transfer_to(answers).download(download_of(), tmp_path / "f")


def test_an_unsatisfiable_range_starts_from_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT[:10])
    answers = Answers(httpx.Response(416), answer(CONTENT))
    transfer_to(answers).download(download_of(), tmp_path / "f")
    assert "range" not in answers.requests[1].headers
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_finished_partial_download_needs_no_request(tmp_path: Path) -> None:
    (tmp_path / "f.part").write_bytes(CONTENT)
    answers = Answers(httpx.Response(500))
    transfer_to(answers).download(download_of(), tmp_path / "f")
    assert answers.requests == []


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (302, PermissionDenied),
        (400, IntegrityError),
        (401, UrlExpired),
        (403, UrlExpired),
        (404, NotFound),
        (409, AlreadyExists),
        (413, IntegrityError),
        (507, ResourceExhausted),
    ],
)
def test_statuses_that_do_not_pass_are_errors_at_once(tmp_path: Path, status: int, error: type[Exception]) -> None:
    (tmp_path / "f").write_bytes(CONTENT)
    answers = Answers(httpx.Response(status, headers={"location": "http://elsewhere/"}, text="said the store"))
    with pytest.raises(error):
        transfer_to(answers).upload(upload_of(), tmp_path / "f")
    with pytest.raises(error):
        transfer_to(answers).download(download_of(), tmp_path / "g")
    assert len(answers.requests) == 2
    assert not (tmp_path / "g").exists()


def test_a_body_that_stalled_on_the_servers_side_is_sent_again(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(CONTENT)
    answers = Answers(httpx.Response(400, text="<Code>RequestTimeout</Code>"), httpx.Response(200))
    transfer_to(answers).upload(upload_of(), tmp_path / "f")
    assert len(answers.requests) == 2


def test_an_upload_sends_the_signed_headers_and_its_length(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(CONTENT)
    answers = Answers(httpx.Response(200))
    transfer_to(answers, base_url="http://store:8080").upload(upload_of(), tmp_path / "f")
    (request,) = answers.requests
    assert (str(request.url), request.content) == ("http://store:8080/object", CONTENT)
    assert request.headers["x-signed"] == "yes"
    assert request.headers["content-length"] == str(len(CONTENT))
    assert "transfer-encoding" not in request.headers


def test_what_is_stored_is_not_sent(tmp_path: Path) -> None:
    answers = Answers(httpx.Response(500))
    transfer_to(answers).upload(pb.Upload(stored=True), tmp_path / "not there")
    assert answers.requests == []


def test_absolute_urls_are_left_alone_and_base_may_come_late(tmp_path: Path) -> None:
    answers = Answers(answer(CONTENT), answer(CONTENT))
    with Transfer(base_url=lambda: "http://late:1", transport=httpx.MockTransport(answers)) as transfer:
        transfer.download(download_of(), tmp_path / "f")
        transfer.download(download_of(url="https://s3.example/b/k?sig=1"), tmp_path / "f")
    assert [str(r.url) for r in answers.requests] == ["http://late:1/object?x=1", "https://s3.example/b/k?sig=1"]


@pytest.mark.parametrize(("base_url", "url"), [("", "/object"), ("http://store", "file:///etc/passwd")])
def test_what_is_not_an_http_url_is_refused(tmp_path: Path, base_url: str, url: str) -> None:
    answers = Answers(answer(CONTENT))
    with pytest.raises(InvalidArgument, match="not an HTTP URL"):
        transfer_to(answers, base_url=base_url).download(download_of(url=url), tmp_path / "f")
    assert answers.requests == []


def test_a_full_disk_is_told_and_the_partial_file_stays_for_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(ResourceExhausted, match="disk is full"):
            transfer_to(Answers(answer(CONTENT))).download(download_of(), tmp_path / "f")
    transfer_to(Answers(httpx.Response(500))).download(download_of(), tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_cancelling_ends_a_wait_between_attempts(tmp_path: Path) -> None:
    cancelled = threading.Event()

    def server(_: httpx.Request) -> httpx.Response:
        cancelled.set()
        return httpx.Response(503)

    patient = RetryPolicy(attempts=3, initial=3600, maximum=3600)
    with pytest.raises(Cancelled):
        transfer_to(server, policy=patient).download(download_of(), tmp_path / "f", cancelled=cancelled)


def parts_of(content: bytes, part_size: int) -> pb.Upload:
    upload = upload_of(content)
    upload.ClearField("request")
    upload.multipart.part_size = part_size
    for number, start in enumerate(range(0, len(content), part_size), start=1):
        request = pb.SignedRequest(method="PUT", url=f"/part/{number}")
        size = len(content[start : start + part_size])
        upload.multipart.parts.add(part_number=number, size=size, request=request)
    return upload


def test_each_part_is_its_own_slice(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(CONTENT)
    received: dict[str, bytes] = {}

    def server(request: httpx.Request) -> httpx.Response:
        received[request.url.path] = request.read()
        return httpx.Response(200)

    upload = parts_of(CONTENT, 10_000)
    del upload.multipart.parts[1]
    moved: list[int] = []
    transfer_to(server).upload(upload, tmp_path / "f", on_bytes=moved.append)
    assert received == {"/part/1": CONTENT[:10_000], "/part/3": CONTENT[20_000:]}
    assert sum(moved) == len(CONTENT) - 10_000


def test_the_first_part_that_fails_is_what_is_told_and_stops_the_rest(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(CONTENT)
    sent: list[str] = []

    def server(request: httpx.Request) -> httpx.Response:
        sent.append(request.url.path)
        return httpx.Response(404 if request.url.path == "/part/1" else 200)

    with pytest.raises(UrlExpired, match="gone"):
        Transfer(base_url="http://store", policy=QUICK, transport=httpx.MockTransport(server), parallel_parts=1).upload(
            parts_of(CONTENT, 100), tmp_path / "f"
        )
    assert len(sent) < len(CONTENT) // 200
