"""The study's cut of the 25-domain corpus: as much of each domain, with ids, and without the domain."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from cbtm_common.errors import InvalidArgument


def cut(source: Path, output: Path, *, domain_bytes: int) -> Path:
    """Writes `output`/corpus.jsonl from the `*.jsonl` of `source`: of each, documents in an order of their ids' hashes
    until their text has `domain_bytes`. Kept when it is there already. Raises InvalidArgument.
    """
    files = sorted(source.glob("*.jsonl"))
    if not files:
        raise InvalidArgument(f"corpus: there is no *.jsonl in {source}", field="corpus")
    target = output / "corpus.jsonl"
    if target.exists():
        return target
    output.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".part")
    with unfinished.open("w", encoding="utf-8") as into:
        for file in files:
            for document in _chosen(file, domain_bytes):
                into.write(json.dumps(document, ensure_ascii=False) + "\n")
    unfinished.rename(target)
    return target


def _chosen(file: Path, domain_bytes: int) -> Iterator[dict[str, str]]:
    with file.open(encoding="utf-8") as lines:
        documents = [{"id": f"{file.stem}-{n}", "text": json.loads(line)["text"]} for n, line in enumerate(lines)]
    taken = 0
    for document in sorted(documents, key=lambda d: _number(d["id"])):
        if taken >= domain_bytes:
            break
        taken += len(document["text"].encode())
        yield document


def parts(corpus: Path, output: Path, *, count: int) -> list[Path]:
    """`corpus` in so many files at random: a hash of each document's id says in which."""
    output.mkdir(parents=True, exist_ok=True)
    paths = [output / f"random-{index}.jsonl" for index in range(count)]
    files = [path.open("w", encoding="utf-8") for path in paths]
    try:
        with corpus.open(encoding="utf-8") as lines:
            for line in lines:
                files[_number("part:" + json.loads(line)["id"]) % count].write(line)
    finally:
        for file in files:
            file.close()
    return paths


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
