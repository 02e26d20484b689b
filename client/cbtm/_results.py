"""What the methods of an ensemble take and return: plain values, no tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cbtm_common.errors import InvalidArgument


@dataclass(frozen=True, kw_only=True)
class ClusterWeight:
    """One cluster's part in a mixture. `top_terms` are words typical of it, where the run tells them."""

    cluster_id: str
    index: int
    weight: float
    top_terms: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Where a text goes: clusters with a weight above 0, heaviest first; weights sum to 1. Where `seed_stands_in`,
    none of them weighs `seed_below`, and the seed model speaks for all.
    """

    text: str
    weights: tuple[ClusterWeight, ...]
    seed_stands_in: bool = False

    @property
    def top(self) -> ClusterWeight:
        return self.weights[0]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Natural-log probability of each token of a text. An empty text has no token and a sum of 0."""

    token_ids: tuple[int, ...]
    token_log_probs: tuple[float, ...]

    @property
    def log_prob(self) -> float:
        """Of the whole text."""
        return math.fsum(self.token_log_probs)

    @property
    def perplexity(self) -> float:
        """NaN for an empty text."""
        return perplexity_of(self.log_prob, len(self.token_log_probs))


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """Token-weighted perplexity over all texts; `float(result)` is the number."""

    perplexity: float
    # Tokens scored, and the sum of their natural-log probabilities.
    tokens: int
    log_likelihood: float
    texts: tuple[Score, ...]
    # Mean weight of each cluster's expert over the scored tokens, and of the seed that stood in for them.
    expert_share: Mapping[str, float]
    seed_share: float = 0.0
    # Clusters of the run that have no expert yet: their weight went to the others.
    missing_clusters: tuple[str, ...] = ()

    def __float__(self) -> float:
        return self.perplexity


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A continued prompt; `str(generation)` is prompt and completion together."""

    prompt: str
    completion: str
    token_ids: tuple[int, ...]
    # "end" of the text, "stop" string, "length" (max_new_tokens), or "context" (no room left).
    finish_reason: str

    def __str__(self) -> str:
        return self.prompt + self.completion


def perplexity_of(log_likelihood: float, tokens: int) -> float:
    """exp of the mean negative log-likelihood; NaN without tokens, infinite when out of a float's range."""
    if not tokens:
        return math.nan
    try:
        return math.exp(-log_likelihood / tokens)
    except OverflowError:
        return math.inf


def check_top_k(asked: Sequence[int] | None, experts: int) -> list[int]:
    """Mixtures to compare, ascending; where none are asked for 1, 2, 4, … below all. Raises InvalidArgument."""
    if asked is None:
        return [2**n for n in range(experts.bit_length()) if 2**n < experts] or [1]
    if not all(1 <= k <= experts for k in asked):
        raise InvalidArgument(f"top_k: {list(asked)} are not all between 1 and the {experts} experts", field="top_k")
    return sorted(set(asked))
