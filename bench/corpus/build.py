"""Builds the corpus: OUT/train/<domain>.jsonl, OUT/valid/<domain>.jsonl, OUT/manifest.json."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_high
from typing import Any

from bench.corpus.archives import read_files, read_inner_tar
from bench.corpus.documents import (
    SEED,
    Document,
    chosen,
    cut,
    is_for_validation,
    is_in_language,
    is_mostly_letters,
)
from bench.corpus.packages import Fetched, PackageCache, file_sha256
from bench.corpus.sources import Catalogue, Domain, Package, Source
from bench.corpus.unfinished import Finished, Unfinished, written_whole
from cbtm_common.errors import AlreadyExists, InvalidArgument, NotFound

PARTS = ("train", "valid")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`domains` are built in the order of their names; a document that one has is in no later one."""

    out: Path
    cache: Path
    cap_mb: float
    domains: tuple[Domain, ...]
    sources_digest: str

    @classmethod
    def choose(cls, catalogue: Catalogue, out: Path, cache: Path, cap_mb: float, only: Sequence[str]) -> Settings:
        """Raises InvalidArgument for a domain that there is not, or a limit that leaves nothing."""
        unknown = sorted(set(only) - set(catalogue.domains))
        if unknown:
            raise InvalidArgument(
                f"only: there is no domain {', '.join(unknown)}; there are {', '.join(catalogue.domains)}", field="only"
            )
        if not cap_mb > 0:
            raise InvalidArgument(f"cap-mb: must be above 0, not {cap_mb:g}", field="cap-mb")
        domains = tuple(domain for name, domain in catalogue.domains.items() if not only or name in only)
        return cls(out=out, cache=cache, cap_mb=cap_mb, domains=domains, sources_digest=catalogue.digest)

    def fixed(self) -> dict[str, Any]:
        """What may not change between an interrupted build and its continuation."""
        return {"cap_mb": self.cap_mb, "domains": [d.name for d in self.domains], "sources": self.sources_digest}


# Says what is being done: a package or domain, how many are done, and of how many.
Say = Callable[[str, int, int], None]


def build(settings: Settings, say: Say) -> dict[str, Any]:
    """The manifest, once all is written. Goes on where an interrupted build was.

    All packages are fetched before the first is read. Raises AlreadyExists where a corpus is, NotFound
    where a domain has no text, and the errors of `PackageCache.fetch`, `read_files` and `Unfinished`.
    """
    manifest_path = settings.out / "manifest.json"
    if manifest_path.exists():
        raise AlreadyExists(f"{settings.out} holds a corpus already: delete it, or name another folder")
    for part in PARTS:
        (settings.out / part).mkdir(parents=True, exist_ok=True)
    unfinished = Unfinished(settings.out / ".unfinished", settings.fixed())
    finished = [(domain, unfinished.find(domain.name)) for domain in settings.domains]
    needed = {p: None for domain, done in finished if done is None for p in domain.packages}
    cache = PackageCache(settings.cache)
    fetched: dict[Package, Fetched] = {}
    for package in needed:
        say(f"fetching {package.key}", len(fetched), len(needed))
        fetched[package] = cache.fetch(package)
    seen: set[bytes] = set()
    rows: list[dict[str, Any]] = []
    packages: dict[str, Any] = {}
    for index, (domain, done) in enumerate(finished):
        say(f"building {domain.name}", index, len(finished))
        if done is None:
            documents = _documents(domain, fetched, seen)
            row = _write(domain, list(documents.values()), settings)
            done = Finished(row=row, packages={p.key: fetched[p].record() for p in domain.packages})
            unfinished.note(domain.name, done, documents)
            seen.update(documents)
        else:
            seen |= unfinished.fingerprints(domain.name)
        rows.append(done.row)
        packages |= done.packages
    manifest = {"seed": SEED, "domains": rows, "packages": dict(sorted(packages.items()))}
    with written_whole(manifest_path) as file:
        json.dump(manifest, file, indent=1)
    unfinished.remove()
    return manifest


def _documents(domain: Domain, fetched: Mapping[Package, Fetched], seen: set[bytes]) -> dict[bytes, Document]:
    """All that the domain could have, by fingerprint, none of which is among `seen`."""
    documents: dict[bytes, Document] = {}
    for source in domain.sources:
        for package in source.packages:
            for document in _cut_files(source, fetched[package]):
                if domain.language and not is_in_language(document.text, domain.language):
                    continue
                fingerprint = document.fingerprint
                if fingerprint not in seen and fingerprint not in documents and is_mostly_letters(document.text):
                    documents[fingerprint] = document
    return documents


def _cut_files(source: Source, package: Fetched) -> Iterator[Document]:
    for path, content in _read(source, package):
        for address, text in source.sections(path, decode(path, content)):
            yield from cut(text, f"{package.tag}:{address}", shortest=source.shortest, by_line=source.by_line)


def _read(source: Source, package: Fetched) -> Iterator[tuple[str, bytes]]:
    if not source.archive:
        yield from read_files(package.path, source.wants)
        return
    for _, content in read_files(package.path, source.holds):
        yield from read_inner_tar(content, source.wants)


def decode(path: str, content: bytes) -> str:
    """UTF-8, or where it is not that, Latin-1; decompressed first where the name says so."""
    if path.endswith((".gz", ".dz")):
        content = gzip.decompress(content)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _write(domain: Domain, available: Sequence[Document], settings: Settings) -> dict[str, Any]:
    """Writes the domain's files; its row of the manifest. Raises NotFound where there is no document."""
    cap = settings.cap_mb if domain.cap_mb is None else domain.cap_mb
    documents = chosen(available, domain.name, cap * 1e6)
    if not documents:
        raise NotFound(
            f"{domain.name}: its packages have no text where sources.toml looks for it; "
            "they may be of another release of Debian than 12"
        )
    in_part: dict[str, list[Document]] = {part: [] for part in PARTS}
    for document, held_out in zip(documents, is_for_validation(documents), strict=True):
        in_part["valid" if held_out else "train"].append(document)
    for part, in_it in in_part.items():
        with written_whole(settings.out / part / f"{domain.name}.jsonl") as file:
            for document in in_it:
                line = {"text": document.text, "domain": domain.name, "source": document.source}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
    lengths = [len(document.text) for document in documents]
    return {
        "domain": domain.name,
        "docs": len(documents),
        **{part: len(in_it) for part, in_it in in_part.items()},
        "text_bytes": _bytes(documents),
        "available_bytes": _bytes(available),
        "chars_p50": median_high(lengths),
        "chars_min": min(lengths),
        "chars_max": max(lengths),
        "sha256": file_sha256(settings.out / "train" / f"{domain.name}.jsonl"),
        "licence": domain.licence,
    }


def _bytes(documents: Sequence[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)
