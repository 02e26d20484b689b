"""Small corpora in files of every kind, and reading them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cbtm_coordinator.clustering.corpus import Document, ReadReport, open_corpus

ROWS = [{"id": f"d{i}", "text": f"document number {i} of é"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def read(*patterns: Path | str, **options: Any) -> tuple[list[Document], ReadReport]:
    report = ReadReport()
    return list(open_corpus([str(p) for p in patterns], **options).documents(report)), report


def texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


def zst(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(data)


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path
