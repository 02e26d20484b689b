"""The embedded backend: a folder, written through the coordinator's HTTP endpoint (`http_app`).

    FOLDER/objects/<key>            the objects, under their own names
    FOLDER/digests/ab/<digest>      {key, size, sha256} of each, named by the SHA-256 of the key
    FOLDER/uploads/<id>/            an open upload: `upload.json` and its parts, `00001` …
    FOLDER/incoming/                files being written

An object appears by one hard link, after its bytes are on the disk; nothing that came by a signed URL replaces an
object (the same content is accepted again, other content is AlreadyExists). The digest was computed here while the
bytes came in, so `stat` vouches for it; where it is missing (a crash between the two) readers hash the object.
Safe for threads and for several processes on one folder; not meant for a network file system.
Completing an upload in parts copies them: it needs its size once more on the disk meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from cbtm_common.errors import AlreadyExists, IntegrityError, InvalidArgument, NotFound, ResourceExhausted, Unavailable
from cbtm_common.faults import point
from cbtm_common.files import hash_file, is_disk_full, safe_join
from cbtm_coordinator.storage.base import (
    CHUNK,
    MAX_PARTS,
    ListedObject,
    ObjectStat,
    OpenUpload,
    Part,
    Signed,
    check_key,
)
from cbtm_coordinator.storage.signing import Grant, UrlSigner

_UPLOAD_ID = re.compile(r"[0-9a-f]{32}", re.ASCII)
_PART_NAME = re.compile(r"[0-9]{5}", re.ASCII)
_INCOMING_KEPT_SECONDS = 86400
# Never filled by uploads: the registry may be on the same disk.
_RESERVE_BYTES = 64 << 20


class LocalStore:
    """An `ObjectStore` in `folder`, which is made if it is not there."""

    def __init__(self, folder: Path, signer: UrlSigner) -> None:
        self.folder = folder.absolute()
        self.signer = signer
        self._objects = self.folder / "objects"
        self._digests = self.folder / "digests"
        self._uploads = self.folder / "uploads"
        self._incoming = self.folder / "incoming"
        for directory in (self._objects, self._digests, self._uploads, self._incoming):
            directory.mkdir(parents=True, exist_ok=True)
        for stale in self._incoming.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - stale.stat().st_mtime > _INCOMING_KEPT_SECONDS:
                    stale.unlink()

    def check(self) -> None:
        try:
            with self.receive(0) as incoming:
                incoming.finish()
        except OSError as error:
            raise Unavailable(f"object_store: {self.folder} cannot be written: {error.strerror}") from error

    # Signing

    def sign_get(self, key: str, *, ttl: timedelta) -> Signed:
        return self.signer.sign(Grant(method="GET", key=key), ttl=ttl)

    def sign_put(self, key: str, *, size: int, sha256: str, ttl: timedelta) -> Signed:
        return self.signer.sign(Grant(method="PUT", key=key, size=size, sha256=sha256), ttl=ttl)

    def sign_part(self, key: str, upload_id: str, *, number: int, size: int, ttl: timedelta) -> Signed:
        if not 1 <= number <= MAX_PARTS:
            raise InvalidArgument(f"part: {number} is not from 1 to {MAX_PARTS}", field="part")
        return self.signer.sign(Grant(method="PUT", key=key, size=size, upload_id=upload_id, part=number), ttl=ttl)

    # Objects

    def path_of(self, key: str) -> Path:
        """Where the object is. Raises NotFound when it is not, InvalidArgument when the key leads elsewhere."""
        path = self._object(key)
        if not path.is_file():
            raise NotFound(f"nothing is stored under {key}", metadata={"key": key})
        return path

    def stat(self, key: str) -> ObjectStat | None:
        try:
            size = self.path_of(key).stat().st_size
        except (NotFound, FileNotFoundError):
            return None
        try:
            noted = json.loads(self._digest_path(key).read_text())
        except FileNotFoundError:
            return ObjectStat(size=size)
        return ObjectStat(size=size, sha256=str(noted["sha256"]) if noted["size"] == size else None)

    def read(self, key: str) -> Iterator[bytes]:
        with self.path_of(key).open("rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk

    def put_bytes(self, key: str, data: bytes) -> None:
        with self.receive(len(data)) as incoming:
            incoming.write(data)
            digest = incoming.finish()
            # The old digest must not vouch for the new content.
            self._digest_path(key).unlink(missing_ok=True)
            os.replace(incoming.path, self._made_room_for(key))
            self._note_digest(key, len(data), digest)

    def delete(self, key: str) -> None:
        path = self._object(key)
        self._digest_path(key).unlink(missing_ok=True)
        if path.is_dir():
            return
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
        # Folders that became empty go too; one that somebody writes to at this moment is not empty, or is made again.
        for parent in path.parents:
            if parent == self._objects:
                break
            try:
                parent.rmdir()
            except OSError:
                break

    # Receiving: what the HTTP endpoint does with a body

    def receive(self, size: int) -> Incoming:
        """A temporary file for exactly `size` bytes. Raises ResourceExhausted when the disk has no room for it."""
        free = shutil.disk_usage(self.folder).free - _RESERVE_BYTES
        if size > free:
            raise ResourceExhausted(
                _disk_full(self.folder, f"{size:,} bytes were to come and {max(free, 0):,} are free")
            )
        return Incoming(self._incoming / secrets.token_hex(16), size)

    def accept(self, incoming: Incoming, grant: Grant) -> None:
        """Makes what came in the part or the object that the grant is for."""
        digest = incoming.finish()
        with self._disk():
            if grant.upload_id:
                directory = self._upload(grant.key, grant.upload_id)
                point("storage.part.before_rename")
                os.replace(incoming.path, directory / f"{grant.part:05d}")
                _sync_directory(directory)
                point("storage.part.after_rename")
                return
            if digest != grant.sha256:
                raise IntegrityError(f"the SHA-256 of what came is {digest}; {grant.sha256} was signed")
            self._publish(incoming, grant.key, digest)

    def _publish(self, incoming: Incoming, key: str, digest: str) -> None:
        point("storage.put.before_rename")
        while True:
            target = self._made_room_for(key)
            try:
                if _link_new(incoming.path, target) or hash_file(target) == (incoming.size, digest):
                    break
            except FileNotFoundError:
                continue  # the empty folder, or the object that was there, was removed in between
            except IsADirectoryError:
                pass
            raise AlreadyExists(f"something else is stored under {key}; it is never replaced", metadata={"key": key})
        _sync_directory(target.parent)
        point("storage.put.before_digest")
        self._note_digest(key, incoming.size, digest)
        point("storage.put.after_rename")

    # Uploads in parts

    def create_multipart(self, key: str) -> str:
        check_key(key)
        upload_id = secrets.token_hex(16)
        # Under a temporary name first: an upload is never seen without its key.
        temporary = self._incoming / upload_id
        with self._disk():
            temporary.mkdir()
            (temporary / "upload.json").write_text(json.dumps({"key": key, "started": time.time()}))
            os.replace(temporary, self._uploads / upload_id)
        return upload_id

    def list_parts(self, key: str, upload_id: str) -> list[Part]:
        try:
            paths = sorted(p for p in self._upload(key, upload_id).iterdir() if _PART_NAME.fullmatch(p.name))
            return [Part(number=int(p.name), size=p.stat().st_size, etag=p.name) for p in paths]
        except FileNotFoundError as error:
            raise _no_upload(key, upload_id) from error

    def list_multipart(self, prefix: str) -> Iterator[OpenUpload]:
        for directory in self._uploads.iterdir():
            with contextlib.suppress(FileNotFoundError):
                note = json.loads((directory / "upload.json").read_text())
                if note["key"].startswith(prefix):
                    started = datetime.fromtimestamp(note["started"], UTC)
                    yield OpenUpload(key=note["key"], upload_id=directory.name, started=started)

    def complete_multipart(self, key: str, upload_id: str, parts: Sequence[Part]) -> None:
        directory = self._upload(key, upload_id)
        try:
            with self._disk(), self.receive(sum(part.size for part in parts)) as incoming:
                for part in sorted(parts, key=lambda p: p.number):
                    with (directory / f"{part.number:05d}").open("rb") as file:
                        while chunk := file.read(CHUNK):
                            incoming.write(chunk)
                self._publish(incoming, key, incoming.finish())
        except FileNotFoundError as error:
            raise _no_upload(key, upload_id) from error
        shutil.rmtree(directory, ignore_errors=True)

    def abort_multipart(self, key: str, upload_id: str) -> None:
        with contextlib.suppress(NotFound):
            shutil.rmtree(self._upload(key, upload_id), ignore_errors=True)

    def list(self, prefix: str) -> Iterator[ListedObject]:
        # From the deepest folder that the whole prefix lies in, so that a listing does not walk the store.
        folder = prefix.rpartition("/")[0]
        start = safe_join(self._objects, folder) if folder else self._objects
        for parent, _, names in os.walk(start):
            for path in (Path(parent, name) for name in names):
                key = path.relative_to(self._objects).as_posix()
                with contextlib.suppress(FileNotFoundError):
                    if key.startswith(prefix) and not path.is_symlink():
                        stat = path.stat()
                        modified = datetime.fromtimestamp(stat.st_mtime, UTC)
                        yield ListedObject(key=key, size=stat.st_size, modified=modified)

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """Says of a full disk, whatever could not be written, what to do about it."""
        try:
            yield
        except OSError as error:
            if is_disk_full(error):
                raise ResourceExhausted(_disk_full(self.folder, str(error))) from error
            raise

    # Paths

    def _object(self, key: str) -> Path:
        return safe_join(self._objects, check_key(key))

    def _digest_path(self, key: str) -> Path:
        name = hashlib.sha256(check_key(key).encode()).hexdigest()
        return self._digests / name[:2] / name

    def _upload(self, key: str, upload_id: str) -> Path:
        """The folder of an open upload of this key. Raises NotFound."""
        directory = self._uploads / upload_id
        if _UPLOAD_ID.fullmatch(upload_id):
            with contextlib.suppress(FileNotFoundError):
                if json.loads((directory / "upload.json").read_text())["key"] == key:
                    return directory
        raise _no_upload(key, upload_id)

    def _made_room_for(self, key: str) -> Path:
        """The object's path, its folder made."""
        path = self._object(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise AlreadyExists(f"an object has the name of a folder of {key}", metadata={"key": key}) from error
        return path

    def _note_digest(self, key: str, size: int, digest: str) -> None:
        path = self._digest_path(key)
        path.parent.mkdir(exist_ok=True)
        temporary = self._incoming / secrets.token_hex(16)
        temporary.write_text(json.dumps({"key": key, "size": size, "sha256": digest}))
        os.replace(temporary, path)


class Incoming:
    """A temporary file that takes exactly `size` bytes, hashed as they pass; gone at the end of its context."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._received = 0
        self._digest = hashlib.sha256()
        try:
            self._file: BinaryIO = path.open("xb")
        except OSError as error:
            raise self._explained(error) from error

    def write(self, data: bytes) -> None:
        self._received += len(data)
        if self._received > self.size:
            raise InvalidArgument(f"more than the signed {self.size} bytes came", field="content-length")
        self._digest.update(data)
        try:
            self._file.write(data)
        except OSError as error:
            raise self._explained(error) from error

    def finish(self) -> str:
        """All is on the disk: its SHA-256. Raises InvalidArgument when bytes are missing."""
        if self._received != self.size:
            raise InvalidArgument(f"{self._received} bytes came; {self.size} were signed", field="content-length")
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._explained(error) from error
        return self._digest.hexdigest()

    def _explained(self, error: OSError) -> Exception:
        if is_disk_full(error):
            return ResourceExhausted(_disk_full(self.path.parent, f"after {self._received:,} of {self.size:,} bytes"))
        return error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.path.unlink(missing_ok=True)
        # Closing flushes, and may find the disk full once more; that has been said.
        with contextlib.suppress(OSError):
            self._file.close()


def _disk_full(folder: Path, detail: str) -> str:
    return f"the disk of the object store ({folder}) is full: {detail}; free some space, then try again"


def _link_new(source: Path, target: Path) -> bool:
    """Whether `target` was free and is now a name of `source`."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise
        # A file system without hard links: two writers at the same moment could both find it free.
        if target.exists():
            return False
        os.replace(source, target)
    return True


def _no_upload(key: str, upload_id: str) -> NotFound:
    return NotFound(f"there is no open upload {upload_id} of {key}", metadata={"key": key})


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
