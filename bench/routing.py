"""Routing weights at every prefix of 2,048-token documents: one incremental pass against vectorising each prefix.

    python -m bench.routing [--quick]

The rival is what the authors' evaluation does: each prefix is decoded and vectorised afresh (scikit-learn's
CountVectorizer, same terms and vocabulary), projected, normalised and compared with the centroids. Both work on the
same documents of the example corpus, on the same machine, in turn; the weights must agree to 1e-6.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bench.report import Report
from cbtm_common.ids import cluster_id
from cbtm_common.routing import CentroidRouter, mixture_weights, normalise, terms
from cbtm_coordinator.clustering.corpus import ReadReport, open_corpus
from cbtm_coordinator.clustering.fit import fit
from cbtm_coordinator.clustering.tokenizer import train_tokenizer

CORPUS = Path(__file__).parent.parent / "examples" / "corpus"
TOKENS = 2048
TOP_K = 2


def prefix_ends(tokenizer: Any, text: str) -> tuple[str, list[int]]:
    """A document of TOKENS tokens and the character end of each prefix."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"][:TOKENS]]
    return text[: ends[-1]], ends


def revectorise(router: CentroidRouter, vectorizer: Any, text: str, ends: list[int]) -> Any:
    """Weights [T, K] by vectorising every prefix from its first character."""
    counts = vectorizer.transform([text[:end] for end in ends]).astype(np.float64)
    counts.data = 1 + np.log(counts.data)
    embedded = normalise(np.asarray(counts @ router.embedding.projection.astype(np.float64)))
    weights = mixture_weights(router.squared_distances(embedded), temperature=router.temperature, top_k=TOP_K)
    unknown = ~embedded.any(axis=1)
    if unknown.any():
        prior = -np.log(np.maximum(router.prior.astype(np.float64), 1e-300))[None]
        weights[unknown] = mixture_weights(prior, temperature=1.0, top_k=TOP_K)
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer documents, under 60 s")
    options = parser.parse_args()
    from sklearn.feature_extraction.text import CountVectorizer

    documents = 2 if options.quick else 8
    corpus = open_corpus([str(CORPUS / "*.jsonl.gz")])
    texts = [document.text for document in corpus.documents(ReadReport())]
    report = Report(bench="routing")
    with TemporaryDirectory() as scratch:
        tokenizer = train_tokenizer(texts[:400], Path(scratch), vocab_size=4096, context=TOKENS)
    # Neighbouring documents of the corpus are put together until they are long enough.
    joined = ["\n\n".join(texts[i : i + 12]) for i in range(0, len(texts), len(texts) // documents)][:documents]
    cut = [prefix_ends(tokenizer, text) for text in joined]
    for clusters in (8, 128):
        ids = [cluster_id("run", index) for index in range(clusters)]
        router = fit(texts, ids, seed=0, temperature=0.1).router
        vectorizer = CountVectorizer(analyzer=terms, vocabulary=list(router.embedding.terms))
        fast_seconds, slow_seconds, difference = [], [], 0.0
        for text, ends in cut:
            started = time.perf_counter()
            fast = router.prefix_weights(text, ends, top_k=TOP_K)
            fast_seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
            slow = revectorise(router, vectorizer, text, ends)
            slow_seconds.append(time.perf_counter() - started)
            difference = max(difference, float(np.abs(fast - slow).max()))
        ratio = float(np.median(np.array(slow_seconds) / np.array(fast_seconds)))
        report.add(f"K={clusters}: times faster than re-vectorising", ratio, "x", bar=50)
        report.add(f"K={clusters}: largest difference of weights", difference, "", bar=1e-6, sense="at most")
        report.add(f"K={clusters}: incremental", TOKENS / float(np.median(fast_seconds)), "tokens/s")
        report.add(f"K={clusters}: re-vectorising", TOKENS / float(np.median(slow_seconds)), "tokens/s")
    report.finish()


if __name__ == "__main__":
    main()
