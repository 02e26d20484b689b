"""The clustering pipeline against the authors': documents/s of fit and assignment, balanced k-means, and memory.

    python -m bench.clustering [--quick] [--corpus PATH ...] [--documents N] [--megabytes N ...]

The corpus of docs/results is FOLDER/train as `python -m bench.corpus FOLDER` makes it. The rival is
`bench.authors_clustering`. Both work on the same documents in turn, in the same run, with all cores. Time is taken from
texts to a fitted model, and from texts to the cluster of each. k-means alone is given the same unit rows: embedded
documents, repeated with noise where the corpus has too few, and the rival's inertia is set beside ours.

Memory is that of a process that draws a sample, fits, assigns, tokenizes and packs a corpus of so many megabytes (the
given one, repeated with words changed at random): the most that it and its workers ever held, and how it grows.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import psutil

from bench.report import Report
from cbtm_common.ids import cluster_id
from cbtm_common.routing import Router
from cbtm_coordinator.clustering.corpus import ReadReport, open_corpus
from cbtm_coordinator.clustering.engine import Local
from cbtm_coordinator.clustering.fit import fit
from cbtm_coordinator.clustering.kmeans import balanced_kmeans
from cbtm_coordinator.clustering.pool import cores, in_order
from cbtm_coordinator.clustering.sample import MAX_CHARACTERS, reservoir
from cbtm_coordinator.clustering.sharding import shard_corpus
from cbtm_coordinator.clustering.tokenizer import train_tokenizer

CORPUS = Path(__file__).parent.parent / "examples" / "corpus"
CLUSTERS = 16
SEED = 0
# Of the k-means comparison.
POINTS, GROUPS = 50_000, 64
SHAPES = ((50_000, 64), (10_007, 13), (4_999, 500), (1_000, 999), (640, 1))
MANY_CHARACTERS = 20_000_000
# Megabytes.
BUFFERS_FULL = 128
# Documents that the clustering is fitted on where memory is measured; fewer than the smallest corpus there has.
SAMPLE = 1_000

T = TypeVar("T")


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """(seconds, what it returned)."""
    started = time.perf_counter()
    result = call()
    return time.perf_counter() - started, result


def engine_for(texts: Sequence[str]) -> Local:
    """As `run create` has it: starting others takes longer than a small corpus."""
    return Local(cores() if sum(map(len, texts)) >= MANY_CHARACTERS else 1)


def assign(router: Router, texts: Sequence[str]) -> Any:
    """The cluster of each text [N], in the pieces of the product's pass over the corpus."""
    pieces = (texts[start : start + 256] for start in range(0, len(texts), 256))
    return np.concatenate(list(in_order(router.assign, pieces, processes=engine_for(texts).processes)))


def compare_pipelines(report: Report, texts: Sequence[str]) -> Any:
    """Fit and assignment of both; our router."""
    # Only here: each process of ours imports this module.
    from bench import authors_clustering as authors

    ids = [cluster_id("run", index) for index in range(CLUSTERS)]
    engine = engine_for(texts)
    fit_ours, fitted = timed(lambda: fit(texts, ids, seed=SEED, temperature=0.1, engine=engine))
    assign_ours, ours = timed(lambda: assign(fitted.router, texts))
    fit_theirs, model = timed(lambda: authors.fit(texts, CLUSTERS, seed=SEED))
    assign_theirs, theirs = timed(lambda: model.assign(texts))
    for name, mine, rival in (("fit", fit_ours, fit_theirs), ("assign", assign_ours, assign_theirs)):
        report.add(f"{name}: times the authors' documents/s", rival / mine, "x", bar=4)
        report.add(f"{name}: ours", len(texts) / mine, "documents/s")
        report.add(f"{name}: the authors'", len(texts) / rival, "documents/s")
    for who, labels in (("ours", ours), ("the authors'", theirs)):
        sizes = np.bincount(labels, minlength=CLUSTERS)
        report.add(f"largest to smallest cluster after assignment: {who}", sizes.max() / max(1, sizes.min()), "x")
    return fitted.router


def spread(embedded: Any, count: int) -> Any:
    """`count` unit rows [N, d]: those given, and as often as needed those again with noise."""
    chance = np.random.default_rng(SEED)
    known = embedded[embedded.any(axis=1)].astype(np.float32)
    rows = np.tile(known, (-(-count // len(known)), 1))[:count]
    rows[len(known) :] += chance.normal(0, 0.03, rows[len(known) :].shape).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows[chance.permutation(count)]


def compare_kmeans(report: Report, points: Any, clusters: int) -> None:
    import torch

    from bench import authors_clustering as authors

    even = points[: len(points) - len(points) % clusters]
    name = f"balanced k-means, N={len(even):,}, d={points.shape[1]}, K={clusters}"
    ours, found = timed(lambda: balanced_kmeans(even, clusters, seed=SEED))
    theirs, (_, _, inertia) = timed(lambda: authors.auction_kmeans(torch.from_numpy(even), clusters, seed=SEED))
    sizes = np.bincount(found.labels, minlength=clusters) / (len(even) / clusters)
    report.add(f"{name}: times faster than the auction", theirs / ours, "x", bar=10)
    report.add(f"{name}: ours", ours, "s")
    report.add(f"{name}: the auction's", theirs, "s")
    report.add(f"{name}: our inertia to the auction's", found.inertia / inertia, "", bar=1, sense="at most")
    off = 100 * float(np.abs(sizes - 1).max())
    report.add(f"{name}: cluster sizes off N/K by up to", off, "%", bar=2, sense="at most")


def check_shapes(report: Report, points: Any, shapes: Sequence[tuple[int, int]]) -> None:
    """Sizes for shapes that divide and that do not: never beyond the whole numbers on both sides of N/K."""
    worst = 0
    for count, clusters in shapes:
        found = balanced_kmeans(points[:count], clusters, seed=SEED, max_iterations=5)
        sizes = np.bincount(found.labels, minlength=clusters)
        worst = max(worst, int(sizes.max()) - -(-count // clusters), count // clusters - int(sizes.min()))
    shown = ", ".join(f"{count:,}/{clusters}" for count, clusters in shapes)
    report.add(f"N/K of {shown}: documents beyond N/K rounded", worst, "", bar=0, sense="at most")


def write_noisy(texts: Sequence[str], path: Path, size: int) -> None:
    """JSONL of about `size` bytes: the texts again and again, every tenth word another's."""
    chance = Random(SEED)
    written = 0
    with path.open("w") as file:
        while written < size:
            words = texts[chance.randrange(len(texts))].split(" ")
            others = texts[chance.randrange(len(texts))].split(" ")
            for place in range(chance.randrange(10), len(words), 10):
                words[place] = chance.choice(others)
            written += file.write(json.dumps({"text": " ".join(words)}) + "\n")


def pipeline(corpus: Path, work: Path) -> None:
    """Everything from a corpus to shards, in this process and its workers; prints what it took as JSON."""
    engine = Local(cores())
    opened = open_corpus([str(corpus)])
    started = time.perf_counter()
    read = ReadReport()
    sample = reservoir(opened.documents(read), size=SAMPLE, seed=SEED)
    tokenizer = train_tokenizer(sample[:500], work / "tokenizer", vocab_size=4096, context=1024)
    ids = [cluster_id("run", index) for index in range(CLUSTERS)]
    router = fit(sample, ids, seed=SEED, temperature=0.1, engine=engine).router
    files = [partial(opened.documents, ReadReport())]
    shard_corpus(files, router, tokenizer, work / "shards", held_out_fraction=0.02, engine=engine)
    print(json.dumps({"documents": read.documents, "seconds": time.perf_counter() - started}))


def peak_of(command: Sequence[str]) -> tuple[float, str]:
    """(MiB that a program and all its processes held together at most, looked at every 50 ms; what it wrote)."""
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        root = psutil.Process(process.pid)
        while process.poll() is None:
            held = 0
            for one in [root, *root.children(recursive=True)]:
                # One that has just ended holds nothing.
                with contextlib.suppress(psutil.NoSuchProcess):
                    held += one.memory_info().rss
            peak = max(peak, held)
            time.sleep(0.05)
        assert process.stdout is not None
        written = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return peak / 2**20, written


def measure_memory(report: Report, texts: Sequence[str], sizes: Sequence[int]) -> None:
    peaks = []
    for megabytes in sizes:
        with TemporaryDirectory() as scratch:
            corpus = Path(scratch) / "corpus.jsonl"
            write_noisy(texts, corpus, megabytes * 1_000_000)
            command = [sys.executable, "-m", "bench.clustering", "--pipeline", str(corpus), scratch]
            peak, written = peak_of(command)
        said = json.loads(written.splitlines()[-1])
        peaks.append(peak)
        report.add(f"{megabytes:,} MB of text: peak memory of all processes", peak, "MiB")
        report.add(f"{megabytes:,} MB of text: corpus to shards", said["documents"] / said["seconds"], "documents/s")
    grown = f"{sizes[-1] / sizes[0]:.0f} times the text: times the memory"
    # Under so much, buffers of a fixed size are not yet full.
    bar = 1.1 if sizes[0] >= BUFFERS_FULL else None
    report.add(grown, peaks[-1] / peaks[0], "x", bar=bar, sense="at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer documents, under 60 s")
    parser.add_argument("--corpus", nargs="+", default=[str(CORPUS)], help="files, folders, globs")
    parser.add_argument("--documents", type=int, help="how many to compare the pipelines on; default all")
    parser.add_argument("--megabytes", type=int, nargs="+", help="sizes of corpus to measure the memory of")
    parser.add_argument("--pipeline", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pipeline:
        pipeline(*options.pipeline)
        return
    quick = options.quick
    documents = open_corpus(options.corpus).documents(ReadReport())
    texts = [document.text[:MAX_CHARACTERS] for document in documents]
    Random(SEED).shuffle(texts)
    compared = texts[: options.documents or (1_500 if quick else len(texts))]
    report = Report(bench="clustering")
    router = compare_pipelines(report, compared)
    count = 5_000 if quick else POINTS
    points = spread(router.embedding.embed(texts[:count]), count)
    compare_kmeans(report, points, 16 if quick else GROUPS)
    check_shapes(report, points, [shape for shape in SHAPES if shape[0] <= count])
    measure_memory(report, texts, options.megabytes or ((4, 16) if quick else (128, 512)))
    report.finish()


if __name__ == "__main__":
    main()
