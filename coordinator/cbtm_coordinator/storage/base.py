"""What the coordinator asks of an object store, and nothing more.

Two backends keep this protocol: a folder behind the coordinator's own HTTP endpoint (`local`, `http_app`) and any
S3-compatible store (`s3`). Callers hand out signed requests and afterwards check what landed (`verify`); no byte of
a worker's passes through a gRPC call.

Guarantees: an object is there whole or not at all; a signed request is good for one method, one key and, for
writing, one length (and one SHA-256, for a whole object), until it expires.
Not guaranteed: atomicity over several objects (the registry's commit is what makes a checkpoint visible), and that S3
knows a digest of what came in parts.

Keys are POSIX-like relative paths: no empty, `.` or `..` segment, no backslash, colon or control character, at most
1,024 bytes, 255 a segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Protocol

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.errors import InvalidArgument
from cbtm_common.files import check_relative
from cbtm_common.protos import timestamp

# Files above this go up in parts of this many bytes (S3 allows parts of 5 MiB to 5 GiB, 10,000 of them).
PART_SIZE = 64 << 20
MAX_PARTS = 10_000
# One call's worth of a stream.
CHUNK = 1 << 20

_MAX_KEY_BYTES = 1024
_MAX_SEGMENT_BYTES = 255


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, kw_only=True)
class Signed:
    """One HTTP request that its holder may make until `expires`. `url` is absolute or path-only."""

    method: str
    url: str
    expires: datetime
    # To be sent exactly so.
    headers: Mapping[str, str] = field(default_factory=dict)

    def to_proto(self) -> pb.SignedRequest:
        return pb.SignedRequest(
            method=self.method, url=self.url, headers=dict(self.headers), expire_time=timestamp(self.expires)
        )


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part that the store holds. `number` is from 1, `size` in bytes; `etag` is the store's own name for it."""

    number: int
    size: int
    etag: str


@dataclass(frozen=True, kw_only=True)
class ObjectStat:
    """An object's length in bytes, and its SHA-256 if the store itself computed one over the whole object."""

    size: int
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class ListedObject:
    key: str
    size: int
    modified: datetime


@dataclass(frozen=True, kw_only=True)
class OpenUpload:
    """A multipart upload that is neither complete nor aborted."""

    key: str
    upload_id: str
    started: datetime


class ObjectStore(Protocol):
    """Thread-safe. Every method raises InvalidArgument for a bad key and Unavailable when the store cannot answer."""

    def check(self) -> None:
        """Proves that the store can be read and written; else raises an error that says what to mend."""

    def sign_get(self, key: str, *, ttl: timedelta) -> Signed: ...

    def sign_put(self, key: str, *, size: int, sha256: str, ttl: timedelta) -> Signed:
        """A PUT of exactly `size` bytes with exactly this SHA-256 (64 hexadecimal digits)."""
        ...

    def create_multipart(self, key: str) -> str:
        """Opens an upload in parts; returns its id."""
        ...

    def sign_part(self, key: str, upload_id: str, *, number: int, size: int, ttl: timedelta) -> Signed:
        """A PUT of one part, of exactly `size` bytes."""
        ...

    def list_parts(self, key: str, upload_id: str) -> list[Part]:
        """Parts that the store holds, by number. Raises NotFound when there is no such upload."""
        ...

    def list_multipart(self, prefix: str) -> Iterator[OpenUpload]:
        """Open uploads of keys that start with `prefix`, in any order."""
        ...

    def complete_multipart(self, key: str, upload_id: str, parts: Sequence[Part]) -> None:
        """Makes one object of the parts, in the order of their numbers. Raises NotFound when there is no upload."""

    def abort_multipart(self, key: str, upload_id: str) -> None:
        """Drops an upload and its parts; nothing happens when it is not there."""

    def stat(self, key: str) -> ObjectStat | None: ...

    def read(self, key: str) -> Iterator[bytes]:
        """The object's bytes in chunks. Raises NotFound."""
        ...

    def put_bytes(self, key: str, data: bytes) -> None:
        """Writes a small object of the coordinator's own; replaces what is there."""

    def delete(self, key: str) -> None:
        """Nothing happens when it is not there."""

    def list(self, prefix: str) -> Iterator[ListedObject]:
        """Objects whose key starts with `prefix`, in any order."""
        ...


def check_key(key: str) -> str:
    """`key` itself if it is one, else InvalidArgument."""
    check_relative(key)
    if not key.isprintable():
        raise InvalidArgument(f"key: {key!r} contains characters that cannot be printed", field="key")
    encoded = key.encode()
    if len(encoded) > _MAX_KEY_BYTES or any(len(s) > _MAX_SEGMENT_BYTES for s in encoded.split(b"/")):
        raise InvalidArgument(f"key: {key[:80]!r}… is longer than a key may be", field="key")
    return key


def part_sizes(size: int, part_size: int = PART_SIZE) -> list[int]:
    """Lengths of the parts of a file, in order; all but the last are `part_size` (larger when 10,000 are too few)."""
    step = max(part_size, -(-size // MAX_PARTS))
    return [min(step, size - start) for start in range(0, size, step)]
