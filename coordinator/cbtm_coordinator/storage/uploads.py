"""From a file that somebody wants to send or fetch to the signed requests that do it.

An upload in parts is found again by its key in the store, so a client that asks twice, or another coordinator process
that is asked the second time, goes on where the first stopped: only missing parts are signed. No state is kept here.
"""

from __future__ import annotations

from datetime import timedelta

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.errors import AlreadyExists, NotFound
from cbtm_common.faults import point
from cbtm_common.files import FileSpec
from cbtm_coordinator.storage.base import PART_SIZE, ObjectStore, Part, part_sizes
from cbtm_coordinator.storage.verify import look


def prepare_download(store: ObjectStore, file: FileSpec, *, ttl: timedelta) -> pb.Download:
    """A signed GET of `file.key`. Does not look whether the object is there."""
    return pb.Download(file=file.to_proto(), request=store.sign_get(file.key, ttl=ttl).to_proto())


def prepare_upload(
    store: ObjectStore, file: FileSpec, *, ttl: timedelta, replace: bool = False, part_size: int = PART_SIZE
) -> pb.Upload:
    """What is still to be sent for `file` to be under `file.key`.

    An object of the right length whose digest the store does not know counts as stored: `verify` reads it back later.
    If another object is there: AlreadyExists, or with `replace` it is deleted first (only for keys that nothing
    visible refers to).
    """
    upload = pb.Upload(file=file.to_proto())
    stat = look(store, file)
    if stat is not None:
        if stat.size == file.size and stat.sha256 in (None, file.sha256):
            upload.stored = True
            return upload
        if not replace:
            raise AlreadyExists(f"{file.path}: another file is stored under {file.key}", metadata={"key": file.key})
        discard(store, file)
    if file.size <= part_size:
        signed = store.sign_put(file.key, size=file.size, sha256=file.sha256, ttl=ttl)
        upload.request.CopyFrom(signed.to_proto())
        return upload
    sizes = part_sizes(file.size, part_size)
    upload_id = _find_upload(store, file.key) or _create(store, file.key)
    held = {p.number: p.size for p in store.list_parts(file.key, upload_id)}
    upload.multipart.upload_id = upload_id
    upload.multipart.part_size = sizes[0]
    for number, size in enumerate(sizes, start=1):
        if held.get(number) != size:
            signed = store.sign_part(file.key, upload_id, number=number, size=size, ttl=ttl)
            upload.multipart.parts.add(part_number=number, size=size, request=signed.to_proto())
    return upload


def finish_upload(store: ObjectStore, file: FileSpec, *, part_size: int = PART_SIZE) -> None:
    """Completes the upload in parts of `file`, if that is how it came; idempotent. Verifies nothing.

    Raises NotFound when parts are missing.
    """
    if file.size <= part_size:
        return
    stat = store.stat(file.key)
    if stat is not None and stat.size == file.size:
        return
    sizes = part_sizes(file.size, part_size)
    missing = len(sizes)
    for open_upload in store.list_multipart(file.key):
        if open_upload.key != file.key:
            continue
        parts = [p for p in store.list_parts(file.key, open_upload.upload_id) if p.number <= len(sizes)]
        good = [p for p in parts if p.size == sizes[p.number - 1]]
        missing = min(missing, len(sizes) - len(good))
        if len(good) == len(sizes):
            _complete(store, file, open_upload.upload_id, good)
            return
    raise NotFound(f"{file.path}: {missing} of {len(sizes)} parts are not stored yet", metadata={"key": file.key})


def discard(store: ObjectStore, file: FileSpec) -> None:
    """Deletes the object under `file.key` and whatever is open for it: a wrong one must not block the right one."""
    point("storage.discard.before")
    for open_upload in list(store.list_multipart(file.key)):
        if open_upload.key == file.key:
            store.abort_multipart(file.key, open_upload.upload_id)
    store.delete(file.key)
    point("storage.discard.after")


def _find_upload(store: ObjectStore, key: str) -> str | None:
    """The newest open upload of exactly this key."""
    found = [u for u in store.list_multipart(key) if u.key == key]
    return max(found, key=lambda u: (u.started, u.upload_id)).upload_id if found else None


def _create(store: ObjectStore, key: str) -> str:
    point("storage.multipart.before_create")
    upload_id = store.create_multipart(key)
    point("storage.multipart.after_create")
    return upload_id


def _complete(store: ObjectStore, file: FileSpec, upload_id: str, parts: list[Part]) -> None:
    point("storage.multipart.before_complete")
    try:
        store.complete_multipart(file.key, upload_id, parts)
        point("storage.multipart.after_complete")
    except NotFound:
        # Somebody else completed it in between.
        stat = store.stat(file.key)
        if stat is None or stat.size != file.size:
            raise
