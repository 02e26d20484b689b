"""Perplexities of mixtures, from what the experts say and how a router weighs them.

Policies are the client's: weights that follow the context at every token or at every 16, or that are settled once a
context has 16 or 32. Everything that is chosen (a temperature, a threshold) is chosen on the validation documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from bench.reproduce.scores import Documents, RunScores
from cbtm import _routing_grid
from cbtm._routing import ContextRouter, RoutingOptions, no_cluster_near
from cbtm._routing_grid import RoutingPolicy, routed_rows
from cbtm._scored import Float64, log_mixtures

# The most expensive first.
POLICIES: Mapping[str, RoutingPolicy] = {policy.name: policy for policy in reversed(_routing_grid.POLICIES)}
# Multiples of the router's own temperature.
TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0)
_THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """On the documents that choices are made on, and on the others."""

    validation: float
    test: float


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """One mixture's perplexity. `k` 0 mixes all experts; `temperature` is what validation chose."""

    policy: str
    k: int
    temperature: float
    perplexity: Perplexity
    # Log-likelihood of each document, for spreads over documents.
    of_documents: Float64


def perplexity(log_probs: npt.NDArray[np.floating], documents: Documents) -> Perplexity:
    """exp of the mean negative log-probability of a token, [tokens] of all documents."""
    at = documents.split
    return Perplexity(
        validation=float(np.exp(-log_probs[:at].astype(np.float64).mean())),
        test=float(np.exp(-log_probs[at:].astype(np.float64).mean())),
    )


def of_documents(log_probs: npt.NDArray[np.floating], documents: Documents) -> Float64:
    """Log-likelihood of each document, [documents]."""
    sums: Float64 = np.add.reduceat(log_probs.astype(np.float64), documents.bounds[:-1])
    return sums


def each_token_weights(router: ContextRouter, documents: Documents, temperature: float) -> Float64:
    """[tokens, K] of all experts: row of a token is of the context before it."""
    options = replace(RoutingOptions(), temperature=temperature)
    at = ContextRouter(router.router, router.detokenizer, options)
    return np.concatenate([at.positions(sequence.ids, sequence.first) for sequence in documents.sequences])


def followed(weights: Float64, documents: Documents, policy: RoutingPolicy) -> Float64:
    """The same under a policy: each row is that of the context which the policy weighs there."""
    rows = [
        start + routed_rows(policy, sequence.first, len(sequence.ids))
        for sequence, start in zip(documents.sequences, documents.bounds[:-1], strict=True)
    ]
    found: Float64 = weights[np.concatenate(rows)]
    return found


def mixtures(
    scores: RunScores, weights: Mapping[float, Float64], documents: Documents, *, ks: Sequence[int]
) -> list[Mixture]:
    """Of every policy and k the one temperature with the best perplexity on validation. `weights`: by temperature."""
    found: dict[tuple[str, int], Mixture] = {}
    for temperature, each in weights.items():
        for name, policy in POLICIES.items():
            at = followed(each, documents, policy)
            of_every_k = log_mixtures(at, scores.experts.T)
            for k in ks:
                mixed = of_every_k[:, k - 1]
                made = Mixture(
                    policy=name,
                    k=k,
                    temperature=temperature,
                    perplexity=perplexity(mixed, documents),
                    of_documents=of_documents(mixed, documents),
                )
                best = found.get((name, k))
                if best is None or made.perplexity.validation < best.perplexity.validation:
                    found[name, k] = made
    return list(found.values())


def with_seed(scores: RunScores, weights: Float64, documents: Documents) -> dict[str, tuple[float, Perplexity]]:
    """Top-1, the seed in place of an expert with a weight under a threshold: (threshold, perplexity) by policy."""
    found = {}
    for name, policy in POLICIES.items():
        at = followed(weights, documents, policy)
        top = log_mixtures(at, scores.experts.T)[:, 0]
        tried = [
            (threshold, perplexity(np.where(no_cluster_near(at, threshold), scores.seed, top), documents))
            for threshold in (0.0, *_THRESHOLDS)
        ]
        found[name] = min(tried, key=lambda pair: pair[1].validation)
    return found


def oracle(scores: RunScores, documents: Documents) -> Perplexity:
    """Each document by the expert that gives it the highest likelihood: what no router can know."""
    of_experts = np.stack([of_documents(row, documents) for row in scores.experts])
    best = of_experts.argmax(axis=0)
    owner = np.repeat(best, np.diff(documents.bounds))
    return perplexity(scores.experts[owner, np.arange(len(owner))], documents)


def at_random(scores: RunScores, documents: Documents) -> dict[int, Perplexity]:
    """Of experts among which nothing tells: one of them (its expected log-likelihood), and all in equal parts."""
    equal = np.full(scores.experts.T.shape, 1 / len(scores.experts))
    together = log_mixtures(equal, scores.experts.T)[:, -1]
    return {1: perplexity(scores.experts.mean(axis=0), documents), 0: perplexity(together, documents)}


def spread(mixture: Float64, dense: Float64, documents: Documents, *, draws: int = 1000) -> tuple[float, float]:
    """95 % interval of the gain over dense on test, by a bootstrap over documents of their log-likelihoods."""
    tokens = np.diff(documents.bounds)[documents.validation :]
    difference = (mixture - dense)[documents.validation :]
    chosen = np.random.default_rng(0).integers(0, len(tokens), (draws, len(tokens)))
    gains = 1 - np.exp(-difference[chosen].sum(axis=1) / tokens[chosen].sum(axis=1))
    low, high = np.quantile(gains, (0.025, 0.975))
    return float(low), float(high)
