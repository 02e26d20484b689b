"""Fetching packages: `apt-get download`, `pip download --no-deps`, `npm pack`. Nothing is installed.

A package is in the cache whole or not at all, and is fetched once.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.corpus.sources import ANY_VERSION, Package
from cbtm_common.errors import InvalidState, Unavailable

_TAGS = {"deb": "{name}={version}", "pypi": "{name}=={version}", "npm": "{name}@{version}"}
_TOOLS = {
    "apt-get": "downloads Debian's packages; build the corpus on Debian 12 or in a container of it",
    "dpkg-deb": "reads Debian's packages; build the corpus on Debian 12 or in a container of it",
    "npm": "downloads packages of JavaScript; install it (on Debian: apt-get install npm)",
    "pip": "downloads packages of Python; install it into this environment (python -m ensurepip)",
}


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A package on this disk, in the version that `package` asks for or, from Debian, another."""

    package: Package
    version: str
    path: Path

    @property
    def tag(self) -> str:
        """Names the package and version in the documents' sources."""
        named = _TAGS[self.package.index].format(name=self.package.name, version=self.version)
        return f"{self.package.index}:{named}"

    def record(self) -> dict[str, Any]:
        """What the manifest says of it."""
        record = {"version": self.version, "sha256": file_sha256(self.path), "bytes": self.path.stat().st_size}
        if self.package.version not in (ANY_VERSION, self.version):
            record["note"] = f"version {self.package.version} is not to be had; this one was taken"
        return record


class PackageCache:
    """A folder of fetched packages."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def fetch(self, package: Package) -> Fetched:
        """Raises InvalidState where a tool is missing, and Unavailable where the package cannot be downloaded."""
        folder = self._folder / package.index
        folder.mkdir(parents=True, exist_ok=True)
        if package.index == "deb":
            return self._fetch_deb(package, folder)
        if package.index == "pypi":
            pattern = f"{package.name.replace('-', '_')}-{package.version}-*.whl"
            options = ["-q", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
            command = [sys.executable, "-m", "pip", "download", *options, f"{package.name}=={package.version}"]
        else:
            pattern = f"{package.name}-{package.version}.tgz"
            command = ["npm", "pack", "--loglevel=error", f"{package.name}@{package.version}"]
        found = sorted(folder.glob(pattern)) or _download(package, command, folder, pattern)
        return Fetched(package=package, version=package.version, path=found[-1])

    def _fetch_deb(self, package: Package, folder: Path) -> Fetched:
        _require("dpkg-deb", package)
        pattern = f"{package.name}_*.deb"
        pinned = f"{package.name}_{glob.escape(package.version)}_*.deb"
        found = sorted(folder.glob(pinned)) or sorted(folder.glob(pattern))
        if not found:
            command = ["apt-get", "download", package.name]
            if package.version == ANY_VERSION:
                found = _download(package, command, folder, pattern)
            else:
                try:
                    found = _download(package, [*command[:-1], f"{package.name}={package.version}"], folder, pattern)
                except Unavailable:
                    # A security update has replaced it.
                    found = _download(package, command, folder, pattern)
        version = _run(package, ["dpkg-deb", "-f", str(found[-1]), "Version"], Path.cwd()).strip()
        return Fetched(package=package, version=version, path=found[-1])


def _download(package: Package, command: Sequence[str], folder: Path, pattern: str) -> list[Path]:
    """Runs `command` in a folder of its own, and moves what it leaves that matches `pattern` to `folder`."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".incoming-") as scratch:
        _run(package, command, Path(scratch))
        arrived = sorted(Path(scratch).glob(pattern))
        if not arrived:
            raise Unavailable(f"{' '.join(command)} ended well and left no {pattern}")
        return [path.rename(folder / path.name) for path in arrived]


def _run(package: Package, command: Sequence[str], folder: Path) -> str:
    tool = "pip" if command[0] == sys.executable else command[0]
    _require(tool, package)
    try:
        done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, errors="replace")
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.split())[-400:]
        hint = "; run apt-get update first, on Debian 12" if tool == "apt-get" else ""
        raise Unavailable(
            f"{package.key} cannot be had: {' '.join(command)} ended with {error.returncode}: {said}{hint}"
        ) from error
    return done.stdout


def _require(tool: str, package: Package) -> None:
    there = importlib.util.find_spec("pip") if tool == "pip" else shutil.which(tool)
    if there is None:
        raise InvalidState(
            f"{tool} is not installed: it is needed for {package.key}, as it {_TOOLS[tool]}; "
            "or leave the domain out with --only"
        )


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
