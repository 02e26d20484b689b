"""Distils docs/results/{pilot,reproduce}*.json to what `cbtm-coord plan` advises by, a file inside the coordinator.

`--check` writes nothing and fails when that file is stale. Rows of several seeds are averaged; random clusters, oracles
and the like, and all but top-1 and top-2, are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
OUT = ROOT / "coordinator" / "cbtm_coordinator" / "planning" / "measurements.json"
_KEY = ("protocol", "clusters", "seed_fraction", "router", "policy", "k")


def distil(studies: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for study in studies:
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in study["rows"]:
            if row["router"] in ("learned", "centroid") and row["k"] in (1, 2) and not row["random"]:
                groups.setdefault(tuple(row[name] for name in _KEY), []).append(row)
        for key, rows in sorted(groups.items()):
            found.append(
                {
                    "source": study["size"],
                    "parameters": study["parameters"],
                    "train_tokens": study["tokens"],
                    "seeds": len(rows),
                    **dict(zip(_KEY, key, strict=True)),
                    "perplexity": round(sum(row["test"] for row in rows) / len(rows), 4),
                    "dense_perplexity": round(sum(row["dense"] for row in rows) / len(rows), 4),
                }
            )
    return found


def text() -> str:
    paths = sorted([*RESULTS.glob("pilot*.json"), *RESULTS.glob("reproduce*.json")])
    rows = distil(json.loads(path.read_text("utf-8")) for path in paths)
    return "[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if not parser.parse_args().check:
        OUT.write_text(text(), "utf-8")
        return 0
    if not OUT.exists() or OUT.read_text("utf-8") != text():
        sys.stderr.write(f"{OUT.relative_to(ROOT)} is stale: run python scripts/generate_measurements.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
