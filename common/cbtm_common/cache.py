"""A content-addressed cache of downloaded files: `sha256/ab/abcdef…`.

A file enters only after its SHA-256 was checked, by an atomic rename, so that whatever carries a digest's name is that
content; processes may share one cache. A file found there is hashed once in a process before it is trusted, and
dropped when it has changed. With `max_bytes`, files least recently used are dropped first, never those of the call.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.errors import ResourceExhausted
from cbtm_common.files import FileSpec, hash_file, safe_join
from cbtm_common.transfer import OnBytes, Transfer, UrlExpired

Prepare = Callable[[list[str]], Sequence[pb.Download]]
# Keys for one request for URLs.
_BATCH = 128


def _ignore(_: int) -> None:
    return None


class ContentCache:
    """Files by content under `directory`. `max_bytes` None: without limit."""

    def __init__(self, directory: Path, *, max_bytes: int | None = None) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self._trusted: set[str] = set()
        self._lock = threading.Lock()

    def path_of(self, sha256: str) -> Path:
        return self.directory / "sha256" / sha256[:2] / sha256

    def fetch_all(
        self,
        files: Sequence[FileSpec],
        prepare: Prepare,
        transfer: Transfer,
        *,
        on_bytes: OnBytes = _ignore,
        cancelled: threading.Event | None = None,
    ) -> dict[str, Path]:
        """Local paths by `FileSpec.path`, downloading what is missing.

        `prepare(keys)` asks for signed URLs; it is asked again when they expire under way. Raises IntegrityError when
        the store's bytes are not the file, ResourceExhausted when the disk cannot hold them.
        """
        missing = [f for f in files if not self._has(f)]
        need = sum(f.size for f in missing)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._make_room(need, keep={f.sha256 for f in files})
        free = shutil.disk_usage(self.directory).free
        if need > free:
            raise ResourceExhausted(f"{self.directory}: {need} bytes are needed and {free} are free; free some space")
        for start in range(0, len(missing), _BATCH):
            batch = {f.key: f for f in missing[start : start + _BATCH]}
            self._fetch_batch(batch, prepare, transfer, on_bytes, cancelled)
        for file in files:
            os.utime(self.path_of(file.sha256))
        return {f.path: self.path_of(f.sha256) for f in files}

    def _fetch_batch(
        self,
        batch: dict[str, FileSpec],
        prepare: Prepare,
        transfer: Transfer,
        on_bytes: OnBytes,
        cancelled: threading.Event | None,
    ) -> None:
        left = dict(batch)
        expired = 0
        while left:
            for download in prepare(list(left)):
                file = left[download.file.key]
                # The digest that the caller asked for counts, not the one that came with the URL.
                asked = pb.Download(file=file.to_proto(), request=download.request)
                try:
                    transfer.download(asked, self.path_of(file.sha256), on_bytes=on_bytes, cancelled=cancelled)
                except UrlExpired:
                    expired += 1
                    if expired > len(batch) + 3:
                        raise
                    break
                self._trusted.add(file.sha256)
                del left[download.file.key]

    def materialize(self, files: Sequence[FileSpec], paths: dict[str, Path], directory: Path) -> Path:
        """Lays `files` out under `directory` by their paths: hard links, or copies across file systems."""
        for file in files:
            target = safe_join(directory, file.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                target.unlink()
            try:
                os.link(paths[file.path], target)
            except OSError:
                shutil.copyfile(paths[file.path], target)
        return directory

    def _has(self, file: FileSpec) -> bool:
        path = self.path_of(file.sha256)
        if not path.exists():
            return False
        with self._lock:
            if file.sha256 in self._trusted and path.stat().st_size == file.size:
                return True
        if hash_file(path) != (file.size, file.sha256):
            path.unlink(missing_ok=True)
            return False
        self._trusted.add(file.sha256)
        return True

    def _make_room(self, need: int, keep: set[str]) -> None:
        if self.max_bytes is None:
            return
        entries = [p for p in (self.directory / "sha256").glob("*/*") if p.is_file()]
        stats = sorted(((p.stat().st_mtime, p.stat().st_size, p) for p in entries), key=lambda entry: entry[0])
        total = sum(size for _, size, _ in stats) + need
        for _, size, path in stats:
            if total <= self.max_bytes:
                return
            if path.name.removesuffix(".part") not in keep:
                path.unlink(missing_ok=True)
                self._trusted.discard(path.name)
                total -= size
