"""From trained runs to rows of results: one for each contender, router, policy and k."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench.reproduce import mixing, token_terms
from bench.reproduce.mixing import Perplexity
from bench.reproduce.scores import Documents, Reader, Scores
from bench.reproduce.training import Experts, Trained
from cbtm._ensemble import Ensemble
from cbtm._scored import Float64, log_mixtures
from cbtm_common.routing import CentroidRouter, LearnedRouter, Router

_KS = (1, 2, 4, 0)
# A router: the learned one, and the seed in place of an expert that it is unsure of.
WITH_SEED = "learned, seed for the unsure"


@dataclass(frozen=True, kw_only=True)
class Row:
    """`k` 0 mixes all experts. `router`: learned, centroid, token ids; or none, where no context is looked at:
    "oracle", "mean" of the parameters, "seed" alone, "random". `gain` is over the dense model of the protocol, on test,
    with a 95 % interval over documents.
    """

    seed: int
    protocol: str
    clusters: int
    seed_fraction: float
    # Whether documents are in clusters at random.
    random: bool
    router: str
    policy: str
    k: int
    temperature: float
    validation: float
    test: float
    dense: float
    gain: float
    gain_low: float | None = None
    gain_high: float | None = None


@dataclass(frozen=True, kw_only=True)
class DenseRow:
    seed: int
    batch: int
    learning_rate: float
    validation: float
    test: float
    best: bool


@dataclass(frozen=True, kw_only=True)
class ExpertRateRow:
    """Protocol B's experts at the greatest K and this rate: top-1 by the learned router, at its own temperature."""

    seed: int
    seed_fraction: float
    learning_rate: float
    validation: float
    best: bool


@dataclass(kw_only=True)
class Findings:
    """Of all seeds."""

    rows: list[Row] = field(default_factory=list)
    dense: list[DenseRow] = field(default_factory=list)
    expert_rates: list[ExpertRateRow] = field(default_factory=list)
    documents: int = 0
    validation_documents: int = 0
    test_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Examiner:
    """Adds one seed's results to `findings`."""

    def __init__(
        self,
        findings: Findings,
        reader: Reader,
        scores: Scores,
        documents: Documents,
        *,
        seed: int,
        sample: Callable[[], Sequence[str]],
        say: Callable[[str], None],
    ) -> None:
        self._findings = findings
        self._reader = reader
        self._scores = scores
        self._documents = documents
        self._seed = seed
        self._sample = sample
        self._say = say

    def examine(self, trained: Trained) -> None:
        documents, found = self._documents, self._findings
        found.documents, found.validation_documents = len(documents), documents.validation
        found.test_tokens = int(documents.bounds[-1]) - documents.split
        for dense in trained.dense:
            at = mixing.perplexity(self._reader.dense(dense.run, self._scores), documents)
            found.dense.append(
                DenseRow(
                    seed=self._seed,
                    batch=dense.batch,
                    learning_rate=dense.learning_rate,
                    validation=at.validation,
                    test=at.test,
                    best=dense.run == trained.best_dense,
                )
            )
        for tried in trained.tried:
            found.expert_rates.append(
                ExpertRateRow(
                    seed=self._seed,
                    seed_fraction=tried.fraction,
                    learning_rate=tried.learning_rate,
                    validation=learned_top_1(tried, self._reader, self._scores, documents).validation,
                    best=tried in trained.experts,
                )
            )
        most = max(experts.clusters for experts in trained.experts)
        for experts in trained.experts:
            self._say(f"mixing {experts.run}")
            dense_run = trained.paper_dense if experts.protocol == "A" else trained.best_dense
            beside = self._reader.dense(dense_run, self._scores)
            headline = experts.protocol == "B" and experts.clusters == most
            _Contender(self, experts, beside, with_token_ids=headline).add()


def learned_top_1(experts: Experts, reader: Reader, scores: Scores, documents: Documents) -> Perplexity:
    """One expert at every token, as the run's learned router has it."""
    said = reader.experts(experts.runs, scores)
    with reader.open(experts.run) as model:
        router = model.context_router
        weights = mixing.each_token_weights(router, documents, router.router.temperature)
    return mixing.perplexity(log_mixtures(weights, said.experts.T)[:, 0], documents)


class _Contender:
    """One set of experts."""

    def __init__(self, examiner: Examiner, experts: Experts, beside: Any, *, with_token_ids: bool) -> None:
        self._of = examiner
        self._experts = experts
        self._documents = examiner._documents
        self._beside = mixing.of_documents(beside, self._documents)
        self._dense = mixing.perplexity(beside, self._documents)
        self._with_token_ids = with_token_ids
        self._scores = examiner._reader.experts(experts.runs, examiner._scores)

    def add(self) -> None:
        scores, documents = self._scores, self._documents
        self._row("seed", "", 1, mixing.perplexity(scores.seed, documents))
        if self._experts.random:
            for k, at in mixing.at_random(scores, documents).items():
                self._row("random", "", k, at)
            return
        self._row("oracle", "", 1, mixing.oracle(scores, documents))
        if scores.mean is not None:
            self._row("mean", "", 1, mixing.perplexity(scores.mean, documents))
        with self._of._reader.open(self._experts.run) as model:
            router = model.context_router.router
            assert isinstance(router, LearnedRouter)
            self._routed("learned", router.temperature, lambda t: self._weights(model, router, t), seed_too=True)
            clustering = router.clustering
            self._routed("centroid", clustering.temperature, lambda t: self._weights(model, clustering, t))
            if self._with_token_ids:
                learned = self._of_token_ids(clustering, model)
                self._routed("token ids", learned.temperature, lambda t: token_terms.weights(learned, documents, t))

    def _weights(self, model: Ensemble, router: Router, temperature: float) -> Float64:
        context = model.context_router
        return mixing.each_token_weights(
            type(context)(router, context.detokenizer, context.options), self._documents, temperature
        )

    def _of_token_ids(self, clustering: CentroidRouter, model: Ensemble) -> LearnedRouter:
        self._of._say("learning a router on token ids")
        return token_terms.learn(clustering, self._of._sample(), model.tokenizer, seed=self._of._seed)

    def _routed(self, name: str, own: float, weigh: Callable[[float], Float64], *, seed_too: bool = False) -> None:
        documents = self._documents
        weights = {own * factor: weigh(own * factor) for factor in mixing.TEMPERATURES}
        ks = [k for k in _KS if k < len(self._scores.experts)]
        for mixture in mixing.mixtures(self._scores, weights, documents, ks=ks):
            interval = mixing.spread(mixture.of_documents, self._beside, documents)
            self._row(name, mixture.policy, mixture.k, mixture.perplexity, mixture.temperature, interval)
        if seed_too:
            for policy, (threshold, at) in mixing.with_seed(self._scores, weights[own], documents).items():
                # What is noted as temperature here is the threshold.
                self._row(WITH_SEED, policy, 1, at, threshold)

    def _row(
        self,
        router: str,
        policy: str,
        k: int,
        at: Perplexity,
        temperature: float = 0.0,
        interval: tuple[float, float] | tuple[None, None] = (None, None),
    ) -> None:
        experts = self._experts
        self._of._findings.rows.append(
            Row(
                seed=self._of._seed,
                protocol=experts.protocol,
                clusters=experts.clusters,
                seed_fraction=experts.fraction,
                random=experts.random,
                router=router,
                policy=policy,
                k=k,
                temperature=temperature,
                validation=at.validation,
                test=at.test,
                dense=self._dense.test,
                gain=1 - at.test / self._dense.test,
                gain_low=interval[0],
                gain_high=interval[1],
            )
        )


def one(rows: Sequence[Row], **wanted: Any) -> list[Row]:
    """Rows whose fields are as wanted."""
    return [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
