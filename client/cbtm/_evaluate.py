"""Perplexity of an ensemble and what it is compared with, over held-out documents, from one pass of each model.

Every expert scores every token once (`_scored`); mixtures of any top k are then arithmetic on those log-probabilities
and on the routing weights, equal to what `Ensemble.perplexity` gives. Compared are the seed model, the dense baseline
where the run has one, each expert alone on its own cluster, and the mixtures.

Protocol (`PROTOCOL`): as `Ensemble.perplexity`. Numbers over all clusters weigh each cluster by its tokens among the
documents given. Nothing is tuned here: the sweep over temperatures shows what a choice is worth; whoever makes one by
it makes it on split "validation", and reports "test".
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cbtm._catalog import Catalog
from cbtm._ensemble import Ensemble
from cbtm._held_out import HeldOutDocument, HeldOutSplit
from cbtm._results import check_top_k, perplexity_of
from cbtm._routing import no_cluster_near
from cbtm._scored import Float64, Progress, ScoredDocuments, log_mixtures, score_documents
from cbtm_common.errors import InvalidArgument
from cbtm_common.routing import keep_top

PROTOCOL = (
    "Each document is scored on its own, all its tokens, the first given the end-of-text token alone; the closing "
    "end-of-text token is not scored. Longer documents are scored in windows that advance by the stride, each scoring "
    "the tokens that the one before could not. Routing sees the whole document so far, never the token to come. "
    "Perplexity is exp of the mean negative log-likelihood of a token; bits per byte divide by the UTF-8 bytes of the "
    "documents, and so compare between tokenizers."
)


@dataclass(frozen=True, kw_only=True)
class ClusterEvaluation:
    """One cluster's documents: perplexities by name ("seed", "expert" for its own, "dense", "top1", …, "all").

    `routed`: the mean weight that each expert, by cluster id, has on their tokens when all are mixed.
    """

    cluster_id: str
    index: int
    top_terms: tuple[str, ...]
    documents: int
    tokens: int
    perplexity: Mapping[str, float]
    routed: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """Perplexities of the mixtures, "top1" … "all", with another temperature of the router."""

    temperature: float
    perplexity: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`perplexity` over all documents by name: "seed", "dense", "expert" (each on its own cluster), "top1", …, "all".

    `bits_per_byte` likewise, over `bytes` of text. `expert_share` is each expert's mean weight at the ensemble's own
    top k and temperature; `top1_share` the share of tokens for which it is the heaviest; both are of the tokens that
    the seed does not stand in for. `split` is of a run's held-out
    documents; None for documents that were given.
    """

    run: str
    documents: int
    tokens: int
    window: int
    stride: int
    temperature: float
    interval: int
    settle_after: int | None
    # Where no cluster weighs as much, the seed stands in: for this share of the tokens.
    seed_below: float | None
    seed_share: float
    bytes: int
    perplexity: Mapping[str, float]
    bits_per_byte: Mapping[str, float]
    clusters: tuple[ClusterEvaluation, ...]
    expert_share: Mapping[str, float]
    top1_share: Mapping[str, float]
    sweep: tuple[SweepPoint, ...]
    missing_clusters: tuple[str, ...]
    split: HeldOutSplit | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the protocol; NaN and infinity, which JSON lacks, become null."""
        values: dict[str, Any] = _jsonable({"protocol": PROTOCOL, **asdict(self)})
        return values


def evaluate(
    model: Ensemble,
    documents: Sequence[HeldOutDocument] | Sequence[str] | ScoredDocuments,
    *,
    top_k: Sequence[int] | None = None,
    temperatures: Sequence[float] = (),
    baseline: Ensemble | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluates `model` on texts, or on token documents with their clusters; with the routing that it has.

    A text belongs to the cluster that the router finds nearest to the whole of it, as in sharding; only the tables by
    cluster use that. What `score_documents` gave is not scored again, so views with other routing cost arithmetic only.
    `top_k`: which mixtures besides all experts; default 1, 2, 4, … `temperatures`: for the sweep. `progress(name, done,
    total)` is told of tokens read by each model.
    """
    ks = check_top_k(top_k, len(model.clusters))
    if not all(0 < temperature < math.inf for temperature in temperatures):
        raise InvalidArgument(f"temperatures: {list(temperatures)} are not all above 0", field="temperatures")
    if isinstance(documents, ScoredDocuments):
        scored = documents
        if baseline is not None:
            raise InvalidArgument("baseline: it is scored with the documents, by score_documents", field="baseline")
    else:
        scored = score_documents(model, documents, baseline=baseline, progress=progress)
    held_out = scored.documents
    values = dict(scored.others)
    place = {cluster.id: i for i, cluster in enumerate(model.clusters)}
    values["expert"] = tuple(
        scored.experts[place[d.cluster_id]][n] if d.cluster_id in place else np.full(len(d.token_ids), np.nan)
        for n, d in enumerate(held_out)
    )
    mixed = _mix(scored, model, ks)
    values |= mixed.values
    sweep = []
    for number, temperature in enumerate(temperatures):
        at = _mix(scored, model.with_routing(temperature=temperature), ks)
        sweep.append(SweepPoint(temperature=temperature, perplexity=_perplexities(at.values, held_out)))
        if progress is not None:
            progress("temperatures", number + 1, len(temperatures))
    return _tabulate(model, scored, values, mixed, tuple(sweep))


def evaluate_run(
    target: str,
    *,
    run: str,
    split: HeldOutSplit = "test",
    token: str | None = None,
    baseline: str | Literal["auto"] | None = "auto",
    top_k: Sequence[int] | None = None,
    temperature: float | None = None,
    temperatures: Sequence[float] = (),
    device: str | None = None,
    dtype: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    max_experts: int | None = None,
    max_tokens_per_cluster: int | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluates a run on the held-out shards that its coordinator keeps; needs a token of role consumer or admin.

    What is reported is of `split` "test"; whatever is chosen by the numbers, such as a temperature, is chosen on
    "validation". `baseline` names a dense run to set beside it; "auto" takes the run's own where one is complete, None
    takes none.
    """
    secret = token or os.environ.get("CBTM_TOKEN") or None
    common: dict[str, Any] = {"token": secret, "device": device, "dtype": dtype, "cache_dir": cache_dir}
    directory = Path(cache_dir) if cache_dir is not None else None
    with Catalog(target, run=run, token=secret, cache_dir=directory) as catalog:
        name = baseline
        if baseline == "auto":
            complete = catalog.baselines()
            name = complete[0].id if complete else None
        documents = catalog.held_out(split=split, max_tokens_per_cluster=max_tokens_per_cluster)
    with Ensemble.from_coordinator(
        target, run=run, temperature=temperature, max_experts=max_experts, **common
    ) as model:
        options: dict[str, Any] = {"top_k": top_k, "temperatures": temperatures, "progress": progress}
        if name is None:
            found = evaluate(model, documents, **options)
        else:
            with Ensemble.from_coordinator(target, run=name, **common) as dense:
                found = evaluate(model, documents, baseline=dense, **options)
    return replace(found, split=split)


@dataclass(frozen=True, kw_only=True)
class _Mixed:
    """Log-probabilities of each mixture, by document; sums over tokens: weights of the experts, and the seed's part."""

    values: dict[str, tuple[Float64, ...]]
    seeded: int
    # At the model's own top k [K]; tokens for which it is the heaviest [K]; of each document, of all experts [D, K].
    share: Float64
    heaviest: Float64
    routed: Float64


def _mix(scored: ScoredDocuments, model: Ensemble, ks: Sequence[int]) -> _Mixed:
    router = model.with_routing(top_k="all", seed_below="never").context_router
    threshold, seed = model.routing.seed_below, scored.others.get("seed")
    if threshold is not None and seed is None:
        raise InvalidArgument("seed_below: the seed was not scored with the documents", field="seed_below")
    count = len(model.clusters)
    seeded = 0
    column = {**{f"top{k}": k - 1 for k in ks}, "all": count - 1}
    values: dict[str, list[Float64]] = {name: [] for name in column}
    share_K, heaviest_K = np.zeros(count), np.zeros(count)
    routed_DK = np.zeros((len(scored.sequences), count))
    for n, sequence in enumerate(scored.sequences):
        weights_TK = router.positions(sequence.ids, sequence.first)
        mixed_TK = log_mixtures(weights_TK, scored.of_experts(n))
        near_T = np.ones(len(weights_TK), dtype=bool)
        if threshold is not None and seed is not None:
            near_T = ~no_cluster_near(weights_TK, threshold)
            mixed_TK = np.where(near_T[:, None], mixed_TK, seed[n][:, None])
            seeded += int(np.count_nonzero(~near_T))
        for name, at in column.items():
            values[name].append(mixed_TK[:, at].copy())
        share_K += keep_top(weights_TK[near_T], model.routing.top_k).sum(axis=0)
        heaviest_K += np.bincount(weights_TK[near_T].argmax(axis=1), minlength=count)
        routed_DK[n] = weights_TK.sum(axis=0)
    return _Mixed(
        values={name: tuple(found) for name, found in values.items()},
        seeded=seeded,
        share=share_K,
        heaviest=heaviest_K,
        routed=routed_DK,
    )


def _perplexities(
    values: Mapping[str, Sequence[Float64]],
    held_out: Sequence[HeldOutDocument],
    numbers: Sequence[int] | None = None,
) -> dict[str, float]:
    """Token-weighted, over the documents of these numbers, or all."""
    chosen = range(len(held_out)) if numbers is None else numbers
    tokens = sum(len(held_out[n].token_ids) for n in chosen)
    return {name: perplexity_of(_log_likelihood(found, chosen), tokens) for name, found in values.items()}


def _log_likelihood(found: Sequence[Float64], numbers: Sequence[int]) -> float:
    return math.fsum(float(found[n].sum()) for n in numbers)


def _tabulate(
    model: Ensemble,
    scored: ScoredDocuments,
    values: Mapping[str, Sequence[Float64]],
    mixed: _Mixed,
    sweep: tuple[SweepPoint, ...],
) -> Evaluation:
    held_out = scored.documents
    rows: dict[str, list[int]] = {}
    for n, document in enumerate(held_out):
        rows.setdefault(document.cluster_id, []).append(n)
    tokens = [len(document.token_ids) for document in held_out]
    everything = range(len(held_out))
    size = sum(len(model.decode(document.token_ids).encode()) for document in held_out)

    def by_cluster(weights_K: Float64) -> dict[str, float]:
        total = float(weights_K.sum()) or 1.0
        return {c.id: float(w) / total for c, w in zip(model.clusters, weights_K, strict=True)}

    clusters = tuple(
        ClusterEvaluation(
            cluster_id=cluster.id,
            index=cluster.index,
            top_terms=cluster.top_terms,
            documents=len(rows[cluster.id]),
            tokens=sum(tokens[n] for n in rows[cluster.id]),
            perplexity=_perplexities(values, held_out, rows[cluster.id]),
            routed=by_cluster(mixed.routed[rows[cluster.id]].sum(axis=0)),
        )
        for cluster in model.parts.clusters
        if cluster.id in rows
    )
    return Evaluation(
        run=model.name,
        documents=len(held_out),
        tokens=sum(tokens),
        window=scored.window,
        stride=scored.stride,
        temperature=model.routing.temperature,
        interval=model.routing.interval,
        settle_after=model.routing.settle_after,
        seed_below=model.routing.seed_below,
        seed_share=mixed.seeded / sum(tokens),
        bytes=size,
        perplexity=_perplexities(values, held_out),
        bits_per_byte={
            name: -_log_likelihood(found, everything) / (math.log(2) * size) if size else math.nan
            for name, found in values.items()
        },
        clusters=clusters,
        expert_share=by_cluster(mixed.share),
        top1_share=by_cluster(mixed.heaviest),
        sweep=sweep,
        missing_clusters=model.missing_clusters,
    )


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
