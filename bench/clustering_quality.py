"""How good the clusters are, against the domains that the documents come from, for many ways to make them.

    python -m bench.clustering_quality [--corpus PATH] [--documents N] [--seeds N] [--variants NAME ...] [--out FILE]

The corpus of docs/results is FOLDER/train as `python -m bench.corpus FOLDER` makes it. A domain is a file of it; no fit
sees which file a document is of. Each seed draws half of the documents to fit on, and all documents are then assigned
as a corpus is, to the nearest centroid. Shown for each way and K, as means over seeds: normalised mutual information
with the domains (arithmetic mean), purity, the largest cluster's documents to the smallest's, and stability, the mutual
information between the clusters of one seed and another. "authors" is `bench.authors_clustering`, "ours" the product's
own `fit` and `assign`; all others are this file's, on the product's SVD and balanced k-means. Writes a table in
Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer, HashingVectorizer
from sklearn.metrics import normalized_mutual_info_score as nmi

from bench import authors_clustering as authors
from cbtm_common.ids import cluster_id
from cbtm_common.routing import terms
from cbtm_coordinator.clustering import kmeans
from cbtm_coordinator.clustering.corpus import ReadReport, open_corpus
from cbtm_coordinator.clustering.fit import fit
from cbtm_coordinator.clustering.sample import MAX_CHARACTERS
from cbtm_coordinator.clustering.svd import truncated_svd
from cbtm_coordinator.clustering.tokenizer import train_tokenizer

CORPUS = Path(__file__).parent.parent / "examples" / "corpus"
CLUSTERS = (8, 25, 64)
VOCABULARY = 16_384


@dataclass(frozen=True, kw_only=True)
class Way:
    """How documents become points, points clusters, and clusters the assignment.

    `power`: each dimension is divided by its singular value to this power, 0 being the paper's.
    """

    terms: str = "words"
    sublinear: bool = True
    idf_power: float = 2.0
    max_terms: int = 65_536
    dimensions: int = 100
    power: float = 0.0
    start: str = "k-means++"
    restarts: int = 4
    capacity: bool = False


BASE = Way()
# Each changes BASE, which is what the product does, in one thing or two.
WAYS: dict[str, Way] = {
    "the authors' weights: linear tf, idf, stop words": replace(BASE, terms="listed", sublinear=False, idf_power=1.0),
    "linear tf": replace(BASE, sublinear=False),
    "idf to 1": replace(BASE, idf_power=1.0),
    "idf to 3": replace(BASE, idf_power=3.0),
    "without English stop words": replace(BASE, terms="listed"),
    "words of one character and signs, too": replace(BASE, terms="pieces"),
    "token ids": replace(BASE, terms="tokens"),
    "token ids, idf to 1": replace(BASE, terms="tokens", idf_power=1.0),
    "character 3- to 5-grams, hashed": replace(BASE, terms="characters", max_terms=1 << 18),
    "words hashed to 65,536": replace(BASE, terms="hashed"),
    "16,384 words": replace(BASE, max_terms=16_384),
    "50 dimensions": replace(BASE, dimensions=50),
    "200 dimensions": replace(BASE, dimensions=200),
    "divided by singular values^1/2": replace(BASE, power=0.5),
    "divided by singular values": replace(BASE, power=1.0),
    "1 start": replace(BASE, restarts=1),
    "1 random start": replace(BASE, restarts=1, start="random"),
    "8 starts": replace(BASE, restarts=8),
    "capacity-limited assignment": replace(BASE, capacity=True),
}


@dataclass(frozen=True)
class Texts:
    """Documents [N] and the number of each one's domain [N]."""

    texts: list[str]
    domains: Any


def read(corpus: Path, documents: int) -> Texts:
    found = []
    for number, path in enumerate(sorted(p for p in corpus.rglob("*.jsonl*") if p.is_file())):
        found += [(d.text[:MAX_CHARACTERS], number) for d in open_corpus([str(path)]).documents(ReadReport())]
    Random(0).shuffle(found)
    found = found[:documents]
    return Texts([text for text, _ in found], np.array([domain for _, domain in found]))


def _without_stop_words(text: str) -> list[str]:
    return [term for term in terms(text) if term not in ENGLISH_STOP_WORDS]


def _pieces(text: str) -> list[str]:
    return [piece.lower() for piece in re.findall(r"\w+|[^\w\s]", text) if not piece[0].isdigit()]


class Counts:
    """Term counts of all documents [N, V] by kind of term, each made once."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self.of = cache(self._of)

    def _of(self, kind: str) -> Any:
        if kind == "words":
            return CountVectorizer(analyzer=terms, dtype=np.float32).fit_transform(self._texts)
        if kind == "listed":
            return CountVectorizer(analyzer=_without_stop_words, dtype=np.float32).fit_transform(self._texts)
        if kind == "pieces":
            return CountVectorizer(analyzer=_pieces, dtype=np.float32).fit_transform(self._texts)
        plain = {"alternate_sign": False, "norm": None, "dtype": np.float32}
        if kind == "hashed":
            return HashingVectorizer(analyzer=terms, n_features=1 << 16, **plain).transform(self._texts)
        if kind == "characters":
            grams = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 5), n_features=1 << 18, **plain)
            return grams.transform(self._texts)
        if kind == "tokens":
            return self._tokens()
        raise ValueError(kind)

    def _tokens(self) -> Any:
        with TemporaryDirectory() as scratch:
            tokenizer = train_tokenizer(self._texts[:2000], Path(scratch), vocab_size=VOCABULARY, context=1024)
        encoded = tokenizer(list(self._texts), add_special_tokens=False, verbose=False)["input_ids"]
        starts = np.concatenate([[0], np.cumsum([len(ids) for ids in encoded])])
        columns = np.fromiter(itertools.chain.from_iterable(encoded), dtype=np.int32, count=int(starts[-1]))
        shape = (len(encoded), len(tokenizer))
        counts = sparse.csr_matrix((np.ones(len(columns), np.float32), columns, starts), shape=shape)
        counts.sum_duplicates()
        return counts


def embed(counts: Any, sample: Any, way: Way, seed: int) -> Any:
    """Unit rows [N, d] of all documents, the embedding fitted on the rows `sample`."""
    df = np.bincount(counts[sample].indices, minlength=counts.shape[1])
    total = np.asarray(counts[sample].sum(axis=0)).ravel()
    able = np.flatnonzero(df >= 2)
    kept = np.sort(able[np.argsort(-total[able], kind="stable")[: way.max_terms]])
    weighed = counts[:, kept].astype(np.float32)
    if way.sublinear:
        weighed.data = 1 + np.log(weighed.data)
    idf = (np.log((1 + len(sample)) / (1 + df[kept])) + 1) ** way.idf_power
    weighed.data *= idf.astype(np.float32)[weighed.indices]
    lengths = np.sqrt(np.asarray(weighed.multiply(weighed).sum(axis=1)).ravel())
    weighed.data /= np.repeat(np.maximum(lengths, 1e-12), np.diff(weighed.indptr)).astype(np.float32)
    components, singular = truncated_svd(weighed[sample], way.dimensions, seed=seed)
    embedded = weighed @ np.ascontiguousarray(components.T / np.maximum(singular, 1e-6) ** way.power)
    return embedded / np.maximum(np.linalg.norm(embedded, axis=1, keepdims=True), 1e-12)


def labels_of(embedded: Any, sample: Any, clusters: int, way: Way, seed: int) -> Any:
    points = np.ascontiguousarray(embedded[sample])
    if way.start == "random":
        chosen = np.random.default_rng(seed).choice(len(points), clusters, replace=False)
        centroids = kmeans._rounds(points, points[chosen], 30).centroids
    else:
        centroids = kmeans.balanced_kmeans(points, clusters, seed=seed, restarts=way.restarts).centroids
    costs = kmeans._costs(embedded, centroids)
    if not way.capacity:
        return costs.argmin(axis=1)
    capacity = kmeans.capacities(len(embedded), clusters)
    prices = kmeans._balance_prices(costs, capacity, np.zeros(clusters, np.float32))
    return kmeans._repair(costs, (costs + prices).argmin(axis=1), capacity)


# (K, labels of all documents) for each of CLUSTERS, one seed.
Labelled = Iterator[tuple[int, Any]]


def by_way(way: Way, counts: Counts, sample: Any, seed: int) -> Labelled:
    embedded = embed(counts.of(way.terms), sample, way, seed)
    for clusters in CLUSTERS:
        yield clusters, labels_of(embedded, sample, clusters, way, seed)


def by_authors(texts: Sequence[str], sample: Any, seed: int) -> Labelled:
    pipeline = authors.vectorizer(seed)
    pipeline.fit([texts[i] for i in sample])
    points = torch.from_numpy(np.asarray(pipeline.transform(texts), dtype=np.float32))
    for clusters in CLUSTERS:
        even = len(sample) - len(sample) % clusters
        centres, _, _ = authors.auction_kmeans(points[sample[:even]], clusters, seed=seed)
        yield clusters, np.asarray(authors.squared_distances(points, centres).argmin(dim=1))


def by_product(texts: Sequence[str], sample: Any, seed: int) -> Labelled:
    for clusters in CLUSTERS:
        ids = [cluster_id("run", index) for index in range(clusters)]
        chosen = [texts[i] for i in sample]
        router = fit(chosen, ids, seed=seed, temperature=0.1).router
        yield clusters, router.assign(texts)


def purity(labels: Any, domains: Any) -> float:
    """The share of documents whose domain is the most frequent one of their cluster."""
    table = np.zeros((labels.max() + 1, domains.max() + 1), dtype=np.int64)
    np.add.at(table, (labels, domains), 1)
    return float(table.max(axis=1).sum()) / len(labels)


def measure(name: str, texts: Texts, counts: Counts, seeds: int) -> dict[int, tuple[float, ...]]:
    """By K: NMI and its spread over seeds, purity, largest to smallest, stability."""
    found: dict[int, list[Any]] = {clusters: [] for clusters in CLUSTERS}
    for seed in range(seeds):
        sample = np.sort(np.random.default_rng(seed).permutation(len(texts.texts))[: len(texts.texts) // 2])
        if name == "authors":
            labelled = by_authors(texts.texts, sample, seed)
        elif name == "ours":
            labelled = by_product(texts.texts, sample, seed)
        else:
            labelled = by_way(WAYS[name], counts, sample, seed)
        for clusters, labels in labelled:
            found[clusters].append(labels)
    result: dict[int, tuple[float, ...]] = {}
    for clusters, runs in found.items():
        scores = [nmi(texts.domains, labels) for labels in runs]
        sizes = [np.bincount(labels, minlength=clusters) for labels in runs]
        pairs = [nmi(a, b) for a, b in itertools.combinations(runs, 2)]
        result[clusters] = (
            float(np.mean(scores)),
            float(np.std(scores)),
            float(np.mean([purity(labels, texts.domains) for labels in runs])),
            float(np.mean([size.max() / max(1, size.min()) for size in sizes])),
            float(np.mean(pairs)) if pairs else float("nan"),
        )
    return result


def row(name: str, result: dict[int, tuple[float, ...]]) -> str:
    cells = [f"{m:.3f} ± {s:.3f} | {p:.3f} | {b:.1f} | {t:.2f}" for m, s, p, b, t in result.values()]
    return f"| {name} | {' | '.join(cells)} |"


def header() -> list[str]:
    names = [f"NMI, K={clusters} | purity | sizes | stable" for clusters in CLUSTERS]
    return [f"| | {' | '.join(names)} |", "| --- |" + " ---: |" * 4 * len(CLUSTERS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=CORPUS, help="a folder with a JSONL file for each domain")
    parser.add_argument("--documents", type=int, default=12_000, help="a random sample of so many")
    parser.add_argument("--seeds", type=int, default=3)
    names = ["authors", "ours", *WAYS]
    parser.add_argument("--variants", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table; else it is printed")
    options = parser.parse_args()
    texts = read(options.corpus, options.documents)
    counts = Counts(texts.texts)
    lines = header()
    for name in options.variants:
        started = time.perf_counter()
        lines.append(row(name, measure(name, texts, counts, options.seeds)))
        print(f"{lines[-1]}   {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    table = "\n".join(lines) + "\n"
    if options.out:
        options.out.write_text(table, "utf-8")
    else:
        print(table, end="")


if __name__ == "__main__":
    main()
