"""How far the second pass has come, on disk: a pass that was killed goes on from there, to the same shards.

A record is written whole or not at all. It outlives the process, not a machine that loses what it has not yet written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cbtm_coordinator.clustering.spool import Key, Sizes

_INPUTS, _POSITION = "inputs.json", "position.json"


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """One packed shard on disk."""

    cluster_index: int
    split: str
    ordinal: int
    path: Path
    tokens: int
    documents: int


@dataclass(kw_only=True)
class ClusterStats:
    """What the pass saw of one cluster."""

    documents: int = 0
    tokens: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Position:
    """All before document `document` of file `file` is in spools of these sizes; `stats` by cluster index."""

    file: int
    document: int
    sizes: Mapping[Key, Sizes]
    stats: Sequence[ClusterStats]

    @property
    def documents(self) -> int:
        return sum(s.documents for s in self.stats)


class Progress:
    """Records in `directory`, of a pass that writes shards into `output`, under `inputs`, which say what it is made of.

    What was done under other inputs is deleted.
    """

    def __init__(self, directory: Path, output: Path, inputs: str) -> None:
        self._directory = directory
        self._output = output
        if directory.exists() and self._read(_INPUTS) != inputs:
            shutil.rmtree(directory)
            shutil.rmtree(output, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
        output.mkdir(parents=True, exist_ok=True)
        self._write(_INPUTS, inputs)

    def reach(self, position: Position) -> None:
        sizes = [[*key, *sizes] for key, sizes in position.sizes.items()]
        stats = [asdict(s) for s in position.stats]
        self._write(_POSITION, {"file": position.file, "document": position.document, "sizes": sizes, "stats": stats})

    def position(self) -> Position | None:
        """Where to go on; None at the beginning."""
        said = self._read(_POSITION)
        if said is None:
            return None
        return Position(
            file=said["file"],
            document=said["document"],
            sizes={(cluster, split): (tokens, lengths) for cluster, split, tokens, lengths in said["sizes"]},
            stats=[ClusterStats(**s) for s in said["stats"]],
        )

    def pack(self, cluster: int, shards: Sequence[ShardFile]) -> None:
        """All shards of a cluster are written."""
        self._write(_packed(cluster), [{**asdict(s), "path": s.path.name} for s in shards])

    def packed(self, cluster: int) -> list[ShardFile] | None:
        """What was written of a cluster, None when not all was."""
        said = self._read(_packed(cluster))
        return None if said is None else [ShardFile(**{**s, "path": self._output / s["path"]}) for s in said]

    def _write(self, name: str, value: Any) -> None:
        path = self._directory / name
        part = path.with_suffix(".part")
        part.write_text(json.dumps(value), "utf-8")
        os.replace(part, path)

    def _read(self, name: str) -> Any:
        path = self._directory / name
        return json.loads(path.read_text("utf-8")) if path.exists() else None


def _packed(cluster: int) -> str:
    return f"packed-{cluster:04d}.json"
