"""Mixture weights for token contexts: at every position of a document, and for contexts that grow.

The token at position t is predicted with the weights of the tokens before t, nothing staler. A context without a known
term has the clusters' prior. Policies:

- `prefix` (c-BTM's Eq. 2): weights are those of the context so far, at every token;
- `prompt`: those of the prompt, kept while the answer grows;
- `fixed`: given by the caller.

Under `prefix` weights may change less often, as serving likes it: every `interval` tokens once there are so many, and
no more after `settle_after` tokens.

Where no cluster weighs `seed_below`, the seed model may stand in for the experts: a wrong expert costs more than the
right one gives. Weights then have one more column, the last, for the seed: 1 there and 0 elsewhere, or the reverse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar

import numpy as np
import numpy.typing as npt

from cbtm._text import Detokenizer, TextState, decode_prefixes
from cbtm_common.errors import InvalidArgument
from cbtm_common.routing import CentroidRouter, Distance, Router, RunningState, TermEmbedding, keep_top

if TYPE_CHECKING:
    from typing import Self

Float64 = npt.NDArray[np.float64]
N = TypeVar("N", int, float)


class Policy(StrEnum):
    PREFIX = "prefix"
    PROMPT = "prompt"
    FIXED = "fixed"


@dataclass(frozen=True, kw_only=True)
class RoutingOptions:
    """How contexts become weights over the experts.

    `top_k` None mixes all experts; `temperature` is Eq. 2's T; `distance` is the paper's ‖·‖² or the authors' code's
    ‖·‖⁴, for which T means something else. `weights` (one for each expert, any scale) goes with policy `fixed` alone.
    `interval` and `settle_after` count tokens of the context, from its beginning. `seed_below` is compared with the
    heaviest weight of all clusters, before the top k are kept; None never lets the seed stand in.
    """

    top_k: int | None = None
    temperature: float = 0.1
    distance: Distance = Distance.SQUARED
    policy: Policy = Policy.PREFIX
    weights: tuple[float, ...] | None = None
    interval: int = 1
    settle_after: int | None = None
    seed_below: float | None = None

    def check(self, experts: int, *, seed: bool = False) -> Self:
        """Itself, if it fits an ensemble of so many experts, with a `seed` model or without. Raises InvalidArgument,
        naming the field.
        """
        if self.top_k is not None and not 1 <= self.top_k <= experts:
            raise InvalidArgument(
                f"top_k: {self.top_k} is not between 1 and {experts}, the number of experts", field="top_k"
            )
        if not 0 < self.temperature < float("inf"):
            raise InvalidArgument(f"temperature: {self.temperature} is not a number above 0", field="temperature")
        for name, value in (("interval", self.interval), ("settle_after", self.settle_after)):
            if value is not None and value < 1:
                raise InvalidArgument(f"{name}: {value} is not at least 1", field=name)
        if self.seed_below is not None and not 0 < self.seed_below <= 1:
            raise InvalidArgument(f"seed_below: {self.seed_below} is not above 0 and at most 1", field="seed_below")
        if self.seed_below is not None and not seed:
            raise InvalidArgument("seed_below: this ensemble has no seed model", field="seed_below")
        if (self.policy is Policy.FIXED) != (self.weights is not None):
            raise InvalidArgument("weights: they go with policy 'fixed', and it needs them", field="weights")
        if self.weights is not None:
            finite = all(np.isfinite(w) and w >= 0 for w in self.weights)
            if len(self.weights) != experts or not finite or sum(self.weights) <= 0:
                raise InvalidArgument(
                    f"weights: {experts} numbers are needed, none negative and not all zero", field="weights"
                )
        return self

    def routed(self, length: int) -> int:
        """How many tokens of a context of `length` its weights are of, under policy `prefix`."""
        if self.settle_after is not None:
            length = min(length, self.settle_after)
        return length if length < self.interval else length - length % self.interval


class RoutingChange(TypedDict, total=False):
    """Routing of one call, or of a view; what is left out or None stays as it is.

    `top_k` "all" mixes every expert; `settle_after` "never" follows the context to its end; `seed_below` "never" leaves
    the seed out; `weights` are by cluster id, or one for each expert, and mean policy "fixed".
    """

    top_k: int | Literal["all"] | None
    temperature: float | None
    policy: Policy | Literal["prefix", "prompt", "fixed"] | None
    weights: Mapping[str, float] | Sequence[float] | None
    distance: Distance | Literal["squared", "quartic"] | None
    interval: int | None
    settle_after: int | Literal["never"] | None
    seed_below: float | Literal["never"] | None


@dataclass(frozen=True)
class ContextState:
    """A context as routing sees it. Immutable: contexts may branch."""

    text: TextState
    running: RunningState
    # The context that weights are of, and how many tokens there are by now.
    routed: RunningState
    length: int
    # Weights that no longer change, [W]: of policies `prompt` and `fixed`.
    settled: Float64 | None = None


class ContextRouter:
    """From token ids to weights [W] over what `columns` says; one object for scoring and generation.

    `seed`: whether there is a seed model that could stand in.
    """

    def __init__(
        self, router: Router, detokenizer: Detokenizer, options: RoutingOptions, *, seed: bool = False
    ) -> None:
        self.router = router
        self.detokenizer = detokenizer
        self.options = options.check(len(router.cluster_ids), seed=seed)
        self._seed = seed

    @property
    def columns(self) -> int:
        """W: the K experts, and the seed after them where it may stand in."""
        return len(self.router.cluster_ids) + (self.options.seed_below is not None)

    def with_options(self, change: RoutingChange) -> ContextRouter:
        """The same router with other options; what `change` leaves out stays. Raises InvalidArgument."""
        unknown = sorted(set(change) - set(RoutingChange.__annotations__))
        if unknown:
            known = ", ".join(RoutingChange.__annotations__)
            raise InvalidArgument(f"routing: {unknown[0]!r} is not one of {known}", field="routing")
        old, ids = self.options, self.router.cluster_ids
        policy, distance = change.get("policy"), change.get("distance")
        top_k, temperature, weights = change.get("top_k"), change.get("temperature"), change.get("weights")
        if policy is not None:
            policy = _enum(Policy, policy, "policy")
        else:
            policy = Policy.FIXED if weights is not None else old.policy
        interval, settle_after = change.get("interval"), change.get("settle_after")
        seed_below = change.get("seed_below")
        given = None if weights is None else fixed_weights(weights, ids)
        options = RoutingOptions(
            top_k=old.top_k if top_k is None else None if top_k == "all" else top_k,
            temperature=old.temperature if temperature is None else temperature,
            distance=old.distance if distance is None else _enum(Distance, distance, "distance"),
            policy=policy,
            weights=given if given is not None or policy is not Policy.FIXED else old.weights,
            interval=old.interval if interval is None else interval,
            settle_after=_or_never(settle_after, old.settle_after),
            seed_below=_or_never(seed_below, old.seed_below),
        )
        return ContextRouter(self.router, self.detokenizer, options, seed=self._seed)

    def text_weights(self, texts: Sequence[str]) -> Float64:
        """[N, W]: weights of whole texts."""
        if self.options.weights is not None:
            return np.repeat(self._fixed()[None], len(texts), axis=0)
        return self._kept(self.router.weights(texts, **self._asked()))

    def positions(self, ids: Sequence[int], first: int) -> Float64:
        """[len(ids) - first, W]: row i is for predicting `ids[first + i]` from the ids before it.

        For policy `prompt` the prompt is `ids[:first]`.
        """
        count = len(ids) - first
        options = self.options
        if options.policy is Policy.FIXED:
            return np.repeat(self._fixed()[None], count, axis=0)
        text, ends = decode_prefixes(self.detokenizer, ids[: first if options.policy is Policy.PROMPT else len(ids)])
        lengths = [first] if options.policy is Policy.PROMPT else [options.routed(n) for n in range(first, len(ids))]
        # Where weights stay for a while they are computed once.
        distinct, place = np.unique(lengths, return_inverse=True)
        wanted = [ends[length] for length in distinct.tolist()]
        weights = self._kept(self.router.prefix_weights(text, wanted, **self._asked()))
        return np.repeat(weights, count, axis=0) if options.policy is Policy.PROMPT else weights[place]

    def start(self, ids: Sequence[int]) -> ContextState:
        """The state of a prompt."""
        text = TextState()
        pieces = []
        for token in ids:
            text, piece = self.detokenizer.push(text, token)
            pieces.append(piece)
        policy = self.options.policy
        at = self.options.routed(len(ids)) if policy is Policy.PREFIX else len(ids)
        routed = self.router.begin().extend("".join(pieces[:at]))
        state = ContextState(text, routed.extend("".join(pieces[at:])), routed, len(ids))
        if policy is Policy.FIXED:
            return replace(state, settled=self._fixed())
        if policy is Policy.PROMPT:
            return replace(state, settled=self.weights([state])[0])
        return state

    def push(self, state: ContextState, token: int) -> ContextState:
        """The state after one more token."""
        if state.settled is not None:
            return state
        text, piece = self.detokenizer.push(state.text, token)
        running = state.running.extend(piece) if piece else state.running
        length = state.length + 1
        return ContextState(text, running, running if self.options.routed(length) == length else state.routed, length)

    def weights(self, states: Sequence[ContextState]) -> Float64:
        """[N, W]: for the token that comes next in each context."""
        settled = [state.settled for state in states if state.settled is not None]
        if len(settled) == len(states):
            return np.stack(settled)
        return self._kept(self.router.running_weights([state.routed for state in states], **self._asked()))

    def _asked(self) -> _Asked:
        """Of the router. Whether the seed stands in is seen by the weights of all clusters."""
        options = self.options
        return {
            "top_k": options.top_k if options.seed_below is None else None,
            "temperature": options.temperature,
            "distance": options.distance,
        }

    def _kept(self, weights_NK: Float64) -> Float64:
        """[N, W], of what the router gave when asked so."""
        threshold = self.options.seed_below
        if threshold is None:
            return _unit(weights_NK)
        far_N = no_cluster_near(weights_NK, threshold)
        kept_NK = _unit(keep_top(weights_NK, self.options.top_k))
        kept_NK[far_N] = 0
        return np.concatenate([kept_NK, far_N[:, None]], axis=1)

    def _fixed(self) -> Float64:
        weights = np.asarray(self.options.weights, dtype=np.float64)
        kept: Float64 = keep_top((weights / weights.sum())[None], self.options.top_k)[0]
        return np.append(kept, np.zeros(self.columns - len(kept)))


class _Asked(TypedDict):
    top_k: int | None
    temperature: float
    distance: Distance


def no_cluster_near(weights_NK: Float64, threshold: float) -> npt.NDArray[np.bool_]:
    """[N]: where the seed stands in, as the heaviest of all clusters weighs less than `threshold`."""
    far: npt.NDArray[np.bool_] = weights_NK.max(axis=1) < threshold
    return far


def fixed_weights(given: Mapping[str, float] | Sequence[float], cluster_ids: Sequence[str]) -> tuple[float, ...]:
    """Weights in the order of `cluster_ids`. A mapping may leave clusters out: they get 0."""
    if not isinstance(given, Mapping):
        return tuple(float(w) for w in given)
    unknown = sorted(set(given) - set(cluster_ids))
    if unknown:
        raise InvalidArgument(f"weights: there is no cluster {unknown[0]!r} in this ensemble", field="weights")
    return tuple(float(given.get(cluster_id, 0.0)) for cluster_id in cluster_ids)


def _or_never(asked: N | Literal["never"] | None, old: N | None) -> N | None:
    if asked is None:
        return old
    return None if asked == "never" else asked


def _enum(kind: Any, value: str, field: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        raise InvalidArgument(f"{field}: {value!r} is not one of {', '.join(kind)}", field=field) from None


def single_router(cluster_id: str) -> CentroidRouter:
    """For an ensemble of one, such as a dense baseline: everything goes to it."""
    return CentroidRouter(
        cluster_ids=[cluster_id],
        embedding=TermEmbedding([], np.zeros((0, 1), np.float32)),
        centroids=np.zeros((1, 1), np.float32),
        prior=np.ones(1, np.float32),
    )


def _unit(weights: Float64) -> Float64:
    """Rows that sum to 1 in float64 (a stored prior does so in float32)."""
    unit: Float64 = weights / weights.sum(axis=1, keepdims=True)
    return unit
