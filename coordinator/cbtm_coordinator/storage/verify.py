"""The check on what landed in the store, made by the coordinator itself before anything becomes visible."""

from __future__ import annotations

import hashlib
from typing import Protocol

from cbtm_common.errors import CheckpointRejected, IntegrityError, NotFound
from cbtm_common.files import FileSpec
from cbtm_coordinator.storage.base import ObjectStat, ObjectStore


class Reader(Protocol):
    """Takes the bytes of one file in order, then is told of its end. May raise CheckpointRejected at any time."""

    def feed(self, chunk: bytes) -> None: ...

    def finish(self) -> None: ...


def verify(store: ObjectStore, file: FileSpec, reader: Reader | None = None) -> None:
    """Returns if the store holds exactly `file` under `file.key`, and `reader`, fed with it, has no objection.

    The length and the SHA-256 come from the store where it computed the digest over the whole object itself; else
    the object is read back, as fast as the store sends it; for a reader it is read in any case. Raises NotFound or
    IntegrityError, with the path and the key in the message. A reader's objection counts only against the right bytes.
    """
    stat = look(store, file)
    if stat is None:
        raise NotFound(f"{file.path}: nothing is stored under {file.key}", metadata={"key": file.key})
    if stat.size != file.size:
        raise _wrong(file, f"{stat.size} bytes are stored, not {file.size}")
    known = stat.sha256
    objection: CheckpointRejected | None = None
    if reader is not None or known is None:
        try:
            known = _read(store, file, reader, known)
        except CheckpointRejected as error:
            known, objection = _read(store, file, None, None), error
    if known != file.sha256:
        raise _wrong(file, f"the SHA-256 of what is stored is {known}, not {file.sha256}")
    if objection is not None:
        raise objection


def look(store: ObjectStore, file: FileSpec) -> ObjectStat | None:
    """What is stored where `file` belongs. Looks twice before it says that it is something else: objects are deleted
    for that, and the first answer may have been cut short by a broken connection.
    """
    stat = store.stat(file.key)
    if stat is None or (stat.size == file.size and stat.sha256 in (None, file.sha256)):
        return stat
    return store.stat(file.key)


def _read(store: ObjectStore, file: FileSpec, reader: Reader | None, known: str | None) -> str:
    """Reads the object, feeding `reader`; its SHA-256, which is not computed again where it is `known`."""
    digest = hashlib.sha256()
    size = 0
    for chunk in store.read(file.key):
        size += len(chunk)
        if size > file.size:
            break
        if known is None:
            digest.update(chunk)
        if reader is not None:
            reader.feed(chunk)
    if size != file.size:
        raise _wrong(file, f"{size} bytes or more were read back, not {file.size}")
    if reader is not None:
        reader.finish()
    return known or digest.hexdigest()


def _wrong(file: FileSpec, what: str) -> IntegrityError:
    return IntegrityError(f"{file.path}: {what} ({file.key})", metadata={"key": file.key, "path": file.path})
