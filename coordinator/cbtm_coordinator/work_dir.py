"""A folder for what is needed only while a command runs, and an end to those whose process was killed.

Beside each folder lies a lock file, which its process holds (flock): the kernel lets go of it however the process ends.
So a folder whose lock is free is nobody's, and is removed by the next command that makes one at the same place. Where
the file system has no such locks, nothing is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cbtm_common.errors import InvalidArgument, ResourceExhausted
from cbtm_common.files import is_disk_full

_PREFIX, _SUFFIX = "cbtm-run-", ".lock"


@contextlib.contextmanager
def work_dir(parent: Path | None) -> Iterator[Path]:
    """A fresh folder in `parent` (None: the system's for temporary files), removed with all it holds at the end.

    Raises InvalidArgument when none can be made there, and ResourceExhausted for what does not fit the disk.
    """
    parent = _parent(parent)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        lock, descriptor = _make_lock(parent)
        folder = lock.with_suffix("")
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise InvalidArgument(
            f"work-dir: no folder can be made in {parent}: {error.strerror}", field="work-dir"
        ) from error
    try:
        yield folder
    except OSError as error:
        if is_disk_full(error):
            raise ResourceExhausted(
                f"work-dir: the disk of {parent} is full; make room, or name a folder on a larger disk by --work-dir"
            ) from error
        raise
    finally:
        _remove(folder, lock)
        os.close(descriptor)


def remove_abandoned(parent: Path | None) -> int:
    """Removes what killed processes of this user have left in `parent`; bytes set free."""
    freed = 0
    for lock in _parent(parent).glob(f"{_PREFIX}*{_SUFFIX}"):
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            # Another user's, or removed since it was listed.
            continue
        try:
            if os.fstat(descriptor).st_uid == os.geteuid() and _take(descriptor) and _is_at(descriptor, lock):
                folder = lock.with_suffix("")
                size = _size(folder)
                if _remove(folder, lock):
                    freed += size
        finally:
            os.close(descriptor)
    return freed


def _parent(parent: Path | None) -> Path:
    return parent or Path(tempfile.gettempdir())


def _make_lock(parent: Path) -> tuple[Path, int]:
    """A new lock file that is ours, and the descriptor that holds it."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=_PREFIX, suffix=_SUFFIX, dir=parent)
        # Where locks are not known, nobody can take this one for free either.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_at(descriptor, Path(name)):
            return Path(name), descriptor
        # Found free in the instant before it was taken, and removed.
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _remove(folder: Path, lock: Path) -> bool:
    """Whether all is gone. The lock file stays as long as anything does: the next command tries again."""
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        return False
    lock.unlink(missing_ok=True)
    return True


def _size(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(path, name).stat(follow_symlinks=False).st_size
    return total
