"""Files as the system knows them: a path within a set, a key in the store, a length and a SHA-256."""

from __future__ import annotations

import errno
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.errors import InvalidArgument

_CHUNK = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True, kw_only=True)
class FileSpec:
    """One file. `size` in bytes; `sha256` is 64 hexadecimal digits; `key` is empty until the store has a place."""

    path: str
    size: int
    sha256: str
    key: str = ""

    def to_proto(self) -> pb.FileSpec:
        return pb.FileSpec(path=self.path, key=self.key, size=self.size, sha256=self.sha256)

    @classmethod
    def from_proto(cls, message: pb.FileSpec) -> FileSpec:
        return cls(path=message.path, key=message.key, size=message.size, sha256=message.sha256)


def hash_file(path: Path) -> tuple[int, str]:
    """(length in bytes, SHA-256 in hexadecimal), read in one pass of bounded memory."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return size, digest.hexdigest()


def is_disk_full(error: BaseException) -> bool:
    """Whether a file could not be written for want of room, on the disk or in somebody's share of it."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def describe(directory: Path) -> list[FileSpec]:
    """Every file under `directory`, sorted by path; keys are empty."""
    paths = sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())
    specs = []
    for path in paths:
        size, digest = hash_file(directory / path)
        specs.append(FileSpec(path=path, size=size, sha256=digest))
    return specs


def check_relative(path: str) -> str:
    """`path` itself, if it stays within its set on every system; else InvalidArgument."""
    pure = PurePosixPath(path)
    bad = not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path or ":" in path
    if bad or str(pure) != path:
        raise InvalidArgument(f"path: {path!r} is not a plain relative path", field="path")
    return path


def check_digest(sha256: str) -> str:
    """`sha256` itself, if it is 64 lower-case hexadecimal digits; else InvalidArgument. Files are named by it."""
    if not _DIGEST.fullmatch(sha256):
        raise InvalidArgument(f"sha256: {sha256[:80]!r} is not 64 lower-case hexadecimal digits", field="sha256")
    return sha256


def check_name(identifier: str, *, field: str) -> str:
    """`identifier` itself, if it may name a folder: letters, digits, "-" and "_"; else InvalidArgument."""
    if not _NAME.fullmatch(identifier):
        raise InvalidArgument(f"{field}: {identifier[:80]!r} is no identifier", field=field)
    return identifier


def safe_join(base: Path, relative: str) -> Path:
    """`base / relative`, refusing whatever could leave `base`, symbolic links on the way included."""
    target = base / check_relative(relative)
    if not target.resolve().is_relative_to(base.resolve()):
        raise InvalidArgument(f"path: {relative!r} leads out of its directory", field="path")
    return target


def strip_prefix(files: Iterable[FileSpec], prefix: str) -> list[FileSpec]:
    """The files under `prefix/`, with paths relative to it."""
    start = prefix.rstrip("/") + "/"
    return [
        FileSpec(path=f.path.removeprefix(start), size=f.size, sha256=f.sha256, key=f.key)
        for f in files
        if f.path.startswith(start)
    ]
