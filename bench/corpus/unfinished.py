"""What a build has finished, beside the corpus until that is whole: an interrupted build goes on after its last domain.

A domain is noted when its files are in place. Its documents' fingerprints are kept, since no later domain may have
those documents again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from cbtm_common.errors import InvalidState

_FINGERPRINT_BYTES = 20


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A domain that is done: its row of the manifest, and those of the packages it is from."""

    row: dict[str, Any]
    packages: dict[str, Any]


class Unfinished:
    """Notes of a build in `folder`. Raises InvalidState when there are notes of a build with other settings."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._folder = folder
        path = folder / "settings.json"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as file:
                json.dump(settings, file)
        elif json.loads(path.read_text()) != settings:
            raise InvalidState(
                f"{folder.parent} holds an unfinished corpus with other settings: delete it, or name another folder"
            )

    def find(self, domain: str) -> Finished | None:
        path = self._folder / f"{domain}.json"
        return Finished(**json.loads(path.read_text())) if path.exists() else None

    def fingerprints(self, domain: str) -> set[bytes]:
        """Of the documents that a finished domain had before its limit."""
        content = (self._folder / f"{domain}.fingerprints").read_bytes()
        return {content[at : at + _FINGERPRINT_BYTES] for at in range(0, len(content), _FINGERPRINT_BYTES)}

    def note(self, domain: str, finished: Finished, fingerprints: Iterable[bytes]) -> None:
        with written_whole(self._folder / f"{domain}.fingerprints") as file:
            file.buffer.write(b"".join(fingerprints))
        with written_whole(self._folder / f"{domain}.json") as file:
            json.dump(asdict(finished), file)

    def remove(self) -> None:
        shutil.rmtree(self._folder)


@contextmanager
def written_whole(path: Path) -> Iterator[TextIOWrapper]:
    """A text file that is there under its name once it is written and closed, or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
