"""A content-addressed cache of downloaded files: `sha256/ab/abcdef…`.

A file enters only after its SHA-256 was checked, by an atomic rename. A file found there is trusted by its length and
hashed once by each process (again when its inode or time changes); a wrong one is dropped and fetched anew. Processes
and threads may share one directory: a file is fetched by one of them while the others wait for it.

With `max_bytes`, and when the disk lacks room, files least recently used are dropped first, but never one that a live
cache object handed out: those are pinned until `release`, `close` or the end of the process. `max_bytes` is thus not a
hard limit. Files are read-only, since others may use them too.

    DIRECTORY/sha256/ab/<digest>   files; <digest>.part is a download that goes on later
    DIRECTORY/locks/               one lock for each of 4,096 groups of digests, and `room.lock` for dropping
    DIRECTORY/pins/                what live processes use
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.errors import Cancelled, NotFound, ResourceExhausted
from cbtm_common.files import FileSpec, check_digest, hash_file, safe_join
from cbtm_common.transfer import OnBytes, Transfer, UrlExpired

# Object keys to signed downloads, as PrepareDownload gives them.
Prepare = Callable[[list[str]], Sequence[pb.Download]]

# Keys for one request: few enough that the last URL is still good when its turn comes, on most links.
_BATCH = 64
_EXPIRED_IN_A_ROW = 3
# Left free on the disk, for everything else on the machine.
_RESERVE_BYTES = 64 << 20
_STALE_PART_SECONDS = 7 * 86400
# How often a wait for another process looks whether it was cancelled.
_LOCK_SECONDS = 0.5


class ContentCache:
    """Files by content under `directory`. `max_bytes` None: bounded by the disk alone."""

    def __init__(self, directory: Path, max_bytes: int | None = None) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self._trusted: dict[str, tuple[int, int, int]] = {}
        self._pinned: dict[str, int] = {}
        self._mutex = threading.Lock()
        for name in ("sha256", "locks", "pins"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        self._pins = directory / "pins" / f"{os.getpid()}-{uuid.uuid4().hex}"
        self._alive = FileLock(str(self._pins) + ".lock", thread_local=False)
        with self._room():
            self._alive.acquire()
            self._pinned_by_anybody()

    def path_of(self, sha256: str) -> Path:
        """Where content of this digest is, if it is here. Raises InvalidArgument for what is no digest."""
        check_digest(sha256)
        return self.directory / "sha256" / sha256[:2] / sha256

    def fetch(
        self,
        file: FileSpec,
        prepare: Prepare,
        transfer: Transfer,
        *,
        on_bytes: OnBytes | None = None,
        cancelled: threading.Event | None = None,
    ) -> Path:
        """`fetch_all` of one file."""
        return self.fetch_all([file], prepare, transfer, on_bytes=on_bytes, cancelled=cancelled)[file.path]

    def fetch_all(
        self,
        files: Sequence[FileSpec],
        prepare: Prepare,
        transfer: Transfer,
        *,
        on_bytes: OnBytes | None = None,
        cancelled: threading.Event | None = None,
    ) -> dict[str, Path]:
        """Local paths by `FileSpec.path`, downloading what is missing; all are pinned.

        `prepare(keys)` asks for signed URLs, at most 64 at a time, and is asked again when they expire under way.
        Raises InvalidArgument for a digest that is none, IntegrityError when the store's bytes are not the file,
        ResourceExhausted when the disk cannot hold them, and whatever `prepare` and `Transfer.download` raise.
        """
        wanted = {check_digest(f.sha256): f for f in files}
        with self._room():
            self._pin(wanted)
        missing = {digest: f for digest, f in wanted.items() if not self._has(f)}
        if missing:
            self._make_room(sum(f.size - self._part_size(f) for f in missing.values()))
            self._fetch_missing(missing, prepare, transfer, on_bytes, cancelled)
        now = time.time_ns()
        for digest in wanted:
            path = self.path_of(digest)
            os.utime(path, ns=(now, path.stat().st_mtime_ns))
        return {f.path: self.path_of(f.sha256) for f in files}

    def materialize(
        self,
        files: Sequence[FileSpec],
        directory: Path,
        prepare: Prepare,
        transfer: Transfer,
        *,
        on_bytes: OnBytes | None = None,
        cancelled: threading.Event | None = None,
    ) -> Path:
        """Fetches `files` and lays them out under `directory` by their paths: hard links, or copies across disks.

        Files already there are replaced, others are left alone: give each set a directory of its own. The links keep
        the content when the cache drops it.
        """
        targets = {file.path: safe_join(directory, file.path) for file in files}
        paths = self.fetch_all(files, prepare, transfer, on_bytes=on_bytes, cancelled=cancelled)
        for path, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            if not (target.exists() and target.samefile(paths[path])):
                _link(paths[path], target)
        return directory

    def release(self, files: Iterable[FileSpec]) -> None:
        """These are no longer in use by this caller: they may be dropped for room. Undoes one fetch of each."""
        with self._mutex:
            for digest in {f.sha256 for f in files} & self._pinned.keys():
                self._pinned[digest] -= 1
                if not self._pinned[digest]:
                    del self._pinned[digest]
            self._write_pins()

    def close(self) -> None:
        """Releases everything."""
        with self._mutex:
            self._pinned.clear()
            self._pins.unlink(missing_ok=True)
        self._alive.release()
        Path(self._alive.lock_file).unlink(missing_ok=True)

    def _fetch_missing(
        self,
        missing: dict[str, FileSpec],
        prepare: Prepare,
        transfer: Transfer,
        on_bytes: OnBytes | None,
        cancelled: threading.Event | None,
    ) -> None:
        left = list(missing.values())
        expired = 0
        while left:
            batch = left[:_BATCH]
            prepared = {d.file.key: d for d in prepare([f.key for f in batch])}
            for file in batch:
                if file.key not in prepared:
                    raise NotFound(f"{file.path}: the coordinator signed no URL for {file.key}")
                # The digest that the caller asked for counts, not the one that came with the URL.
                asked = pb.Download(file=file.to_proto(), request=prepared[file.key].request)
                try:
                    with self._locked(file.sha256, cancelled):
                        if not self._has(file):
                            self._download(asked, transfer, on_bytes, cancelled)
                except UrlExpired:
                    expired += 1
                    if expired > _EXPIRED_IN_A_ROW:
                        raise
                    break
                expired = 0
                left.remove(file)

    def _download(
        self, asked: pb.Download, transfer: Transfer, on_bytes: OnBytes | None, cancelled: threading.Event | None
    ) -> None:
        path = self.path_of(asked.file.sha256)
        transfer.download(asked, path, on_bytes=on_bytes, cancelled=cancelled)
        path.chmod(0o444)
        self._trust(asked.file.sha256)

    def _has(self, file: FileSpec) -> bool:
        """Whether the very content is here; a wrong file is removed."""
        path = self.path_of(file.sha256)
        try:
            identity = _identity(path)
        except FileNotFoundError:
            return False
        with self._mutex:
            if self._trusted.get(file.sha256) == identity and identity[1] == file.size:
                return True
        if hash_file(path) != (file.size, file.sha256):
            path.unlink(missing_ok=True)
            return False
        self._trust(file.sha256)
        return True

    def _trust(self, digest: str) -> None:
        with self._mutex:
            self._trusted[digest] = _identity(self.path_of(digest))

    def _part_size(self, file: FileSpec) -> int:
        part = self.path_of(file.sha256).with_suffix(".part")
        return min(part.stat().st_size, file.size) if part.exists() else 0

    # Sharing

    @contextlib.contextmanager
    def _locked(self, digest: str, cancelled: threading.Event | None) -> Iterator[None]:
        """Held by whoever fetches this content; the wait for another can be cancelled."""
        lock = FileLock(str(self.directory / "locks" / f"{digest[:3]}.lock"))
        while True:
            try:
                lock.acquire(timeout=_LOCK_SECONDS)
                break
            except Timeout:
                if cancelled is not None and cancelled.is_set():
                    raise Cancelled("the download was cancelled") from None
        try:
            yield
        finally:
            lock.release()

    def _room(self) -> FileLock:
        """Held while pinning and while dropping, so that nothing is dropped between a look and its use."""
        return FileLock(str(self.directory / "locks" / "room.lock"))

    def _pin(self, digests: Iterable[str]) -> None:
        with self._mutex:
            for digest in digests:
                self._pinned[digest] = self._pinned.get(digest, 0) + 1
            self._write_pins()

    def _write_pins(self) -> None:
        temporary = self._pins.with_suffix(".tmp")
        temporary.write_text(json.dumps(sorted(self._pinned)))
        os.replace(temporary, self._pins)

    def _pinned_by_anybody(self) -> set[str]:
        """Also removes what dead processes left."""
        pinned: set[str] = set()
        for lock_path in (self.directory / "pins").glob("*.lock"):
            pins = lock_path.with_suffix("")
            if pins != self._pins and _is_dead(lock_path):
                pins.unlink(missing_ok=True)
                lock_path.unlink(missing_ok=True)
                continue
            with contextlib.suppress(FileNotFoundError):
                pinned.update(json.loads(pins.read_text()))
        return pinned

    def _make_room(self, need: int) -> None:
        """Drops files least recently used until `need` bytes fit. Raises ResourceExhausted when they cannot."""
        with self._room():
            entries = [(p, p.stat()) for p in (self.directory / "sha256").glob("*/*") if p.is_file()]
            total = sum(stat.st_size for _, stat in entries)
            free = shutil.disk_usage(self.directory).free - _RESERVE_BYTES
            excess = max(need - free, 0 if self.max_bytes is None else total + need - self.max_bytes)
            pinned = self._pinned_by_anybody() if excess > 0 else set()
            for path, stat in sorted(entries, key=lambda entry: entry[1].st_atime_ns):
                if excess <= 0:
                    break
                partial = path.name.endswith(".part")
                if path.name in pinned or (partial and time.time() - stat.st_mtime < _STALE_PART_SECONDS):
                    continue
                path.unlink(missing_ok=True)
                excess -= stat.st_size
            free = shutil.disk_usage(self.directory).free
        if need > free:
            raise ResourceExhausted(
                f"{self.directory}: {need:,} bytes are needed and {free:,} are free; "
                "free some space or choose another cache folder"
            )


def _identity(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _is_dead(lock_path: Path) -> bool:
    """Whether nobody holds this lock."""
    lock = FileLock(str(lock_path))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    lock.release()
    return True


def _link(source: Path, target: Path) -> None:
    """`target` becomes `source`'s content by one rename."""
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        try:
            os.link(source, temporary)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
