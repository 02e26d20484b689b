"""What the corpus is made of: `sources.toml`, read."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from bench.corpus.formats import FORMATS, Section

PATH = Path(__file__).with_name("sources.toml")
ANY_VERSION = "*"


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package of an index: `deb`, `pypi` or `npm`. `version` may be ANY_VERSION with `deb`."""

    index: str
    name: str
    version: str

    @property
    def key(self) -> str:
        return f"{self.index}:{self.name}"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Files of packages that are texts of a domain.

    `under` is a folder of the package; `match` and `drop` are regular expressions searched for in a file's path in the
    package. `archive` matches a tar in the package that the files are in. `address` names a text: {path}, {name}, and
    {section} where a file has several. `shortest` characters is what the shortest documents aim at. `by_line`: every
    line is a paragraph.
    """

    packages: tuple[Package, ...]
    match: str
    format: str
    under: str = ""
    drop: str = ""
    archive: str = ""
    address: str = "{path}"
    shortest: int = 700
    by_line: bool = False

    def wants(self, path: str) -> bool:
        if self.under and not path.startswith(self.under + "/"):
            return False
        return bool(re.search(self.match, path)) and not (self.drop and re.search(self.drop, path))

    def holds(self, path: str) -> bool:
        """Whether this file of the package is the tar that `archive` means."""
        return bool(self.archive and re.search(self.archive, path))

    def sections(self, path: str, text: str) -> Iterator[Section]:
        """The texts in one file, with their addresses in the package."""
        for section, found in FORMATS[self.format](text):
            yield self.address.format(path=path, name=path.rpartition("/")[2], section=section), found


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One file of the corpus. `cap_mb`: megabytes of text at most, in place of the corpus's own limit. `language`:
    documents in another are left out.
    """

    name: str
    licence: str
    sources: tuple[Source, ...]
    cap_mb: float | None = None
    language: str | None = None

    @cached_property
    def packages(self) -> tuple[Package, ...]:
        return tuple(dict.fromkeys(package for source in self.sources for package in source.packages))


@dataclass(frozen=True)
class Catalogue:
    """All domains, by name in order; `digest` is of the file they are from."""

    domains: dict[str, Domain]
    packages: tuple[Package, ...]
    digest: str

    @classmethod
    def load(cls, path: Path = PATH) -> Self:
        content = path.read_bytes()
        tables = tomllib.loads(content.decode())
        packages = [
            Package(index=index, name=name, version=version)
            for index, versions in tables["packages"].items()
            for name, version in versions.items()
        ]
        by_key = {package.key: package for package in packages}
        domains = {name: _domain(name, table, by_key) for name, table in sorted(tables["domains"].items())}
        return cls(domains, tuple(packages), hashlib.sha256(content).hexdigest())


def _domain(name: str, table: dict[str, Any], packages: dict[str, Package]) -> Domain:
    sources = tuple(
        Source(**source | {"packages": tuple(packages[key] for key in source["packages"])})
        for source in table["sources"]
    )
    return Domain(name=name, **table | {"sources": sources})
