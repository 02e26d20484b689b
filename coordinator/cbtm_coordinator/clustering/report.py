"""The report of a run's corpus and clustering, as JSON: what was read, what was left out, how the clusters came out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from cbtm_coordinator.clustering.corpus import Corpus, ReadReport
from cbtm_coordinator.clustering.fit import FitResult
from cbtm_coordinator.clustering.learn import LearnResult
from cbtm_coordinator.clustering.progress import ClusterStats, ShardFile
from cbtm_coordinator.clustering.sharding import HELD_OUT

FORMAT = "cbtm-report-1"


def write_report(
    path: Path,
    *,
    corpus: Corpus,
    read: ReadReport,
    fitted: FitResult,
    learned: LearnResult | None,
    shards: Sequence[ShardFile],
    stats: Sequence[ClusterStats],
) -> None:
    """Writes the report of one run; `stats` by cluster index."""
    sizes = [s.documents for s in stats]
    held_out = [0] * len(stats)
    for shard in shards:
        if shard.split == HELD_OUT:
            held_out[shard.cluster_index] += shard.tokens
    report = {
        "format": FORMAT,
        "files": len(corpus.files),
        "bytes": corpus.total_bytes,
        "documents": read.documents,
        "characters": read.characters,
        "tokens": sum(s.tokens for s in stats),
        "bad_lines": read.bad_lines,
        "bad_line_samples": [{"where": bad.where, "why": bad.why} for bad in read.samples],
        "explained_variance": fitted.explained_variance,
        "inertia": fitted.inertia,
        "learned_router": learned and learned.report(),
        # Of documents; None when a cluster is empty.
        "largest_to_smallest": max(sizes) / min(sizes) if min(sizes) else None,
        "clusters": [
            {
                "index": index,
                "documents": s.documents,
                "tokens": s.tokens,
                "held_out_tokens": held_out[index],
                "top_terms": list(fitted.top_terms[index]),
            }
            for index, s in enumerate(stats)
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False), "utf-8")
