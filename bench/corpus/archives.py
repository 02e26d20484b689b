"""The files in a package, or in a tar inside one, without installing or unpacking it."""

from __future__ import annotations

import gzip
import io
import lzma
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CalledProcessError
from typing import IO, Any

from cbtm_common.errors import IntegrityError

Wanted = Callable[[str], bool]
_DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    CalledProcessError,
)


def read_files(archive: Path, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the files of a `.deb`, `.whl` or `.tgz` whose paths are wanted.

    In the order of the paths, or for a `.deb` as one walks through a tree: of each folder first the files, then the
    folders. (Of documents that are the same, the first is kept: another order is another corpus.) Symbolic links are
    left out. Raises IntegrityError when the archive cannot be read.
    """
    try:
        if archive.suffix == ".whl":
            yield from _read_zip(archive, wanted)
        else:
            with tempfile.TemporaryFile() as plain:
                _decompress(archive, plain)
                yield from _read_tar(plain, wanted, order=_files_first if archive.suffix == ".deb" else str)
    except _DAMAGED as error:
        said = error.stderr.decode(errors="replace").strip() if isinstance(error, CalledProcessError) else error
        raise IntegrityError(f"{archive} cannot be read ({said}): delete it to have it fetched again") from error


def read_inner_tar(content: bytes, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    """The same of a `.tar.xz` that is itself a file of a package."""
    with tempfile.TemporaryFile() as plain, lzma.open(io.BytesIO(content)) as compressed:
        shutil.copyfileobj(compressed, plain)
        yield from _read_tar(plain, wanted)


def _decompress(archive: Path, plain: IO[bytes]) -> None:
    """Writes the tar in `archive`: to read in another order than it was written in is slow in a compressed one."""
    if archive.suffix == ".deb":
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        subprocess.run(command, check=True, stdout=plain, stderr=subprocess.PIPE)
    else:
        with gzip.open(archive) as compressed:
            shutil.copyfileobj(compressed, plain)


def _read_tar(plain: IO[bytes], wanted: Wanted, *, order: Callable[[str], Any] = str) -> Iterator[tuple[str, bytes]]:
    plain.seek(0)
    with tarfile.open(fileobj=plain, mode="r:") as tar:
        members = {m.name.removeprefix("./"): m for m in tar if m.isreg() or m.islnk()}
        for name in sorted(filter(wanted, members), key=order):
            content = tar.extractfile(members[name])
            assert content is not None, name
            yield name, content.read()


def _read_zip(archive: Path, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(archive) as opened:
        names = [info.filename for info in opened.infolist() if not info.is_dir() and wanted(info.filename)]
        for name in sorted(names):
            yield name, opened.read(name)


def _files_first(path: str) -> list[tuple[bool, str]]:
    *folders, name = path.split("/")
    return [*((True, folder) for folder in folders), (False, name)]
