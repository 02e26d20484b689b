"""The check on what landed in the store, made by the coordinator itself before anything becomes visible."""

from __future__ import annotations

import hashlib

from cbtm_common.errors import IntegrityError, NotFound
from cbtm_common.files import FileSpec
from cbtm_coordinator.storage.base import ObjectStat, ObjectStore


def verify(store: ObjectStore, file: FileSpec) -> None:
    """Returns if the store holds exactly `file` under `file.key`.

    The length and the SHA-256 come from the store where it computed the digest over the whole object itself; else
    the object is read back, as fast as the store sends it. Raises NotFound or IntegrityError, with the path and the
    key in the message.
    """
    stat = look(store, file)
    if stat is None:
        raise NotFound(f"{file.path}: nothing is stored under {file.key}", metadata={"key": file.key})
    if stat.size != file.size:
        raise _wrong(file, f"{stat.size} bytes are stored, not {file.size}")
    found = stat.sha256 or _read_digest(store, file)
    if found != file.sha256:
        raise _wrong(file, f"the SHA-256 of what is stored is {found}, not {file.sha256}")


def look(store: ObjectStore, file: FileSpec) -> ObjectStat | None:
    """What is stored where `file` belongs. Looks twice before it says that it is something else: objects are deleted
    for that, and the first answer may have been cut short by a broken connection.
    """
    stat = store.stat(file.key)
    if stat is None or (stat.size == file.size and stat.sha256 in (None, file.sha256)):
        return stat
    return store.stat(file.key)


def _read_digest(store: ObjectStore, file: FileSpec) -> str:
    digest = hashlib.sha256()
    size = 0
    for chunk in store.read(file.key):
        digest.update(chunk)
        size += len(chunk)
    if size != file.size:
        raise _wrong(file, f"{size} bytes were read back, not {file.size}")
    return digest.hexdigest()


def _wrong(file: FileSpec, what: str) -> IntegrityError:
    return IntegrityError(f"{file.path}: {what} ({file.key})", metadata={"key": file.key, "path": file.path})
