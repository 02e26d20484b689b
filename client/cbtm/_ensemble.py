"""`Ensemble`: a run's experts as one language model.

Ties the parts together and checks what a user gives; the work is done in `_routing`, `_scoring`, `_decoder`,
`_residency`. Over 400 lines because it is the public surface: half of it is signatures, overloads and their docs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import numpy as np

from cbtm._decoder import MixtureDecoder
from cbtm._folder import load_parts, load_routing, save_parts
from cbtm._forward import TokenBatch, batch_log_probs
from cbtm._generate import GenerateOptions, generate
from cbtm._members import Members, assemble, first_routing, renewed
from cbtm._members import TopK as TopK
from cbtm._parts import ClusterInfo, EnsembleParts, ExpertChanges
from cbtm._residency import ExpertPool, Placement, Residency
from cbtm._results import ClusterWeight, Generation, PerplexityResult, Routing, Score, perplexity_of
from cbtm._routing import ContextRouter, Policy, RoutingChange, RoutingOptions
from cbtm._scoring import TokenSequence, mixture_scores
from cbtm._tokens import TextCodec
from cbtm_common.errors import InvalidArgument, InvalidState
from cbtm_common.routing import Distance

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# One text, or several.
Texts = str | list[str] | tuple[str, ...]


class Ensemble:
    """The experts of a run, mixed by c-BTM's Eq. 1 and 2: p(x_t) = Σ_j w_j(x_<t) · p_j(x_t), for the top k experts.

    Made by `from_coordinator` or `load`. Experts are loaded when first needed, and at most `max_experts` (or
    `max_bytes` of weights) are in memory at a time. Every text starts with the end-of-text token as its context, as
    documents do in training. A context manager; `close` ends the connection of one that came from a coordinator.

    Arguments that both constructors share, all optional:

    - `top_k`: experts mixed at each token; "all" for every one. Default: the run's.
    - `temperature`: T of Eq. 2. Default: the run's.
    - `device` ("cpu", "cuda:0", …), `dtype` ("float32", "bfloat16", …; default as stored).
    - `max_experts`, `max_bytes`: what may be in memory; default no limit. `max_memory`: bytes for each device, as in
      transformers; `device_map`: "auto" for all GPUs, or devices by expert. See `cbtm._residency.Placement`.
    """

    def __init__(self, members: Members, *, top_k: TopK) -> None:
        # Replaced in one assignment by `refresh`, so that a call sees either all of the old or all of the new.
        self._members = members
        self._asked_top_k = top_k

    # Where it comes from, and where it goes

    @classmethod
    def from_coordinator(
        cls,
        target: str,
        *,
        run: str,
        token: str | None = None,
        top_k: TopK = None,
        temperature: float | None = None,
        device: str | None = None,
        dtype: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        max_experts: int | None = None,
        max_bytes: int | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        device_map: str | Mapping[str, str] | None = None,
    ) -> Self:
        """The experts that a run (name or id) has at the coordinator `target` ("host:port").

        `token` is a consumer's; default the environment's CBTM_TOKEN, or none, which is enough where the catalog is
        public. Files are cached in `cache_dir`. A run in progress gives a partial ensemble: `missing_clusters` says
        whose weight goes to the others. Raises InvalidState when no expert is finished, NotFound, Unauthenticated,
        Unavailable.
        """
        from cbtm._catalog import Catalog

        catalog = Catalog(
            target,
            run=run,
            token=token or os.environ.get("CBTM_TOKEN") or None,
            cache_dir=Path(cache_dir) if cache_dir is not None else None,
        )
        placement = Placement(
            device=device,
            dtype=dtype,
            max_experts=max_experts,
            max_bytes=max_bytes,
            max_memory=max_memory,
            device_map=device_map,
        )
        try:
            return cls._of(catalog.parts(), placement, top_k=top_k, temperature=temperature)
        except BaseException:
            catalog.close()
            raise

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        top_k: TopK = None,
        temperature: float | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_experts: int | None = None,
        max_bytes: int | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        device_map: str | Mapping[str, str] | None = None,
    ) -> Self:
        """An ensemble that `save` wrote; needs no coordinator. What is not given is as it was saved, routing too.

        Raises NotFound, IntegrityError, InvalidArgument.
        """
        placement = Placement(
            device=device,
            dtype=dtype,
            max_experts=max_experts,
            max_bytes=max_bytes,
            max_memory=max_memory,
            device_map=device_map,
        )
        parts, saved = load_parts(Path(path)), load_routing(Path(path))
        return cls._of(parts, placement, top_k=top_k, temperature=temperature, saved=saved)

    @classmethod
    def _of(
        cls,
        parts: EnsembleParts,
        placement: Placement,
        *,
        top_k: TopK,
        temperature: float | None,
        saved: RoutingOptions | None = None,
    ) -> Self:
        routing = first_routing(parts, top_k=top_k, temperature=temperature, saved=saved)
        members = assemble(parts, Residency(placement), TextCodec(parts.tokenizer_dir), routing)
        return cls(members, top_k=top_k)

    def refresh(self) -> ExpertChanges:
        """Takes up experts that the run has accepted since, and drops those withdrawn; what changed, by cluster.

        All at once or, when anything fails, not at all: then the ensemble is as it was. A top k larger than the
        experts that are left is as many as there are. Generation that goes on meanwhile, and views made by
        `with_routing`, keep the experts they began with. Raises InvalidState when no expert is left, or when the
        ensemble is a folder's, which does not change; Unavailable when the coordinator does not answer.
        """
        old = self._members
        if old.parts.reload is None:
            raise InvalidState(
                "refresh: this ensemble is a folder's, which does not change; open the run with from_coordinator"
            )
        new, changes = renewed(old, old.parts.reload(), asked=self._asked_top_k)
        self._members = new
        for cluster_id in (*changes.removed, *changes.replaced):
            old.pool.residency.drop(old.parts.experts[cluster_id])
        return changes

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        report: Callable[[str], None] = lambda _: None,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        """Writes all of it to one folder (see `cbtm._folder`), fetching experts that are not on this disk yet.

        `report` is told of each model as it is written; `extra` are more text files by name, for the top of the
        folder. Raises AlreadyExists when something is at `path`.
        """
        save_parts(self.parts, Path(path), self.routing, overwrite=overwrite, report=report, extra=extra or {})

    def with_routing(
        self,
        *,
        top_k: TopK = None,
        temperature: float | None = None,
        policy: Policy | Literal["prefix", "prompt", "fixed"] | None = None,
        weights: Mapping[str, float] | Sequence[float] | None = None,
        distance: Distance | Literal["squared", "quartic"] | None = None,
        interval: int | None = None,
        settle_after: int | Literal["never"] | None = None,
        seed_below: float | Literal["never"] | None = None,
    ) -> Ensemble:
        """A view of the same experts (shared, not loaded again) with other routing; what is not given stays.

        `policy`: "prefix" routes anew at every token, "prompt" once on the prompt, "fixed" uses `weights` (by cluster
        id, or one for each expert). `distance` "quartic" is the authors' code, "squared" the paper. With "prefix",
        weights may follow the context every `interval` tokens only, and stay as they are after `settle_after`. Where no
        cluster weighs `seed_below`, the seed model stands in for the experts.
        """
        members = self._members
        router = members.routed(
            {
                "top_k": top_k,
                "temperature": temperature,
                "policy": policy,
                "weights": weights,
                "distance": distance,
                "interval": interval,
                "settle_after": settle_after,
                "seed_below": seed_below,
            }
        )
        asked = self._asked_top_k if top_k is None else top_k
        return type(self)(replace(members, router=router), top_k=asked)

    def close(self) -> None:
        """Drops the experts from memory and ends the connection to the coordinator, if there is one."""
        self.pool.clear()
        self.parts.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        options = self.context_router.options
        missing = f", {len(self.missing_clusters)} missing" if self.missing_clusters else ""
        return (
            f"<cbtm.Ensemble {self.parts.run_name}: {len(self.clusters)} experts{missing}, "
            f"top_k={options.top_k or 'all'}, temperature={options.temperature:g}, {self.pool.device}>"
        )

    # What it is

    @property
    def name(self) -> str:
        """Of the run."""
        return self.parts.run_name

    @property
    def clusters(self) -> tuple[ClusterInfo, ...]:
        """Those whose expert is here, in order of their index: the K of every weight vector."""
        return self._members.clusters

    @property
    def missing_clusters(self) -> tuple[str, ...]:
        """Ids of the run's clusters that have no expert (yet); weights are renormalised over the others."""
        return tuple(cluster.id for cluster in self.parts.missing)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self._members.codec.tokenizer

    @property
    def routing(self) -> RoutingOptions:
        return self.context_router.options

    @property
    def context_router(self) -> ContextRouter:
        """From token ids to weights."""
        return self._members.router

    @property
    def pool(self) -> ExpertPool:
        """The experts in memory, and how many loads that took."""
        return self._members.pool

    @property
    def parts(self) -> EnsembleParts:
        return self._members.parts

    # What it does

    @overload
    def route(self, text: str) -> Routing: ...
    @overload
    def route(self, text: list[str] | tuple[str, ...]) -> list[Routing]: ...
    def route(self, text: Texts) -> Routing | list[Routing]:
        """The clusters that a text goes to, with the weights that its continuation would start from."""
        texts = [text] if isinstance(text, str) else list(text)
        routings: list[Routing] = []
        if not texts:
            return routings
        router, experts = self.context_router, len(self.clusters)
        weights_NW = router.text_weights(texts)
        stands_in_N = weights_NW[:, experts:].sum(axis=1) > 0
        if np.count_nonzero(stands_in_N):
            # Where a text would go is told all the same.
            weights_NW = router.with_options({"seed_below": "never"}).text_weights(texts)
        for one, weights, stands_in in zip(texts, weights_NW[:, :experts], stands_in_N.tolist(), strict=True):
            order = sorted(np.flatnonzero(weights).tolist(), key=lambda i: (-weights[i], i))
            found = (
                ClusterWeight(
                    cluster_id=self.clusters[i].id,
                    index=self.clusters[i].index,
                    weight=float(weights[i]),
                    top_terms=self.clusters[i].top_terms,
                )
                for i in order
            )
            routings.append(Routing(text=one, weights=tuple(found), seed_stands_in=stands_in))
        return routings[0] if isinstance(text, str) else routings

    @overload
    def score(self, text: str, *, prompts: str | None = None) -> Score: ...
    @overload
    def score(self, text: list[str] | tuple[str, ...], *, prompts: Texts | None = None) -> list[Score]: ...
    def score(self, text: Texts, *, prompts: Texts | None = None) -> Score | list[Score]:
        """Log-probability of each token of each text, given its prompt if there is one.

        Prompt and text are tokenized apart and joined. Long texts are scored in windows, as `perplexity` does.
        """
        texts = [text] if isinstance(text, str) else list(text)
        before = [""] * len(texts) if prompts is None else [prompts] if isinstance(prompts, str) else list(prompts)
        if len(before) != len(texts):
            raise InvalidArgument(f"prompts: {len(before)} for {len(texts)} texts", field="prompts")
        if self.context_router.options.policy is Policy.PROMPT and prompts is None:
            raise InvalidArgument("prompts: policy 'prompt' routes on them, so they are needed", field="prompts")
        sequences = [self._members.codec.sequence(t, prompt=p) for t, p in zip(texts, before, strict=True)]
        scores, _ = self._score(sequences)
        return scores[0] if isinstance(text, str) else scores

    def perplexity(
        self,
        texts: Texts,
        *,
        window: int | None = None,
        stride: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> PerplexityResult:
        """exp of the mean negative log-probability of a token, over all tokens of all texts (token-weighted).

        Protocol: each text is scored on its own, all its tokens, the first given the end-of-text token alone; the
        closing end-of-text token is not scored. Texts longer than `window` tokens (default: what the experts were
        trained on, within their context) are scored in windows that advance by `stride` (default: half a window), each
        scoring the tokens that the one before could not. Routing sees the whole text so far. Tokens are the run's own:
        numbers of models with different tokenizers do not compare.
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        if self.context_router.options.policy is Policy.PROMPT:
            raise InvalidArgument("policy: 'prompt' has no prompt here; use score with prompts", field="policy")
        sequences = [self._members.codec.sequence(text) for text in given]
        scores, share = self._score(sequences, window=window, stride=stride, progress=progress)
        tokens = sum(len(score.token_ids) for score in scores)
        if not tokens:
            raise InvalidArgument("texts: they hold no token to score", field="texts")
        total = sum(score.log_prob for score in scores)
        return PerplexityResult(
            perplexity=perplexity_of(total, tokens),
            tokens=tokens,
            log_likelihood=total,
            texts=tuple(scores),
            expert_share={c.id: float(s) for c, s in zip(self.clusters, share[: len(self.clusters)], strict=True)},
            seed_share=float(share[len(self.clusters) :].sum()),
            missing_clusters=self.missing_clusters,
        )

    @overload
    def generate(
        self,
        prompt: str,
        max_new_tokens: int = ...,
        *,
        temperature: float = ...,
        top_p: float | None = ...,
        top_k_tokens: int | None = ...,
        seed: int = ...,
        stop: str | Sequence[str] = ...,
        on_text: Callable[[int, str], None] | None = ...,
        routing: RoutingChange | None = ...,
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        max_new_tokens: int = ...,
        *,
        temperature: float = ...,
        top_p: float | None = ...,
        top_k_tokens: int | None = ...,
        seed: int = ...,
        stop: str | Sequence[str] = ...,
        on_text: Callable[[int, str], None] | None = ...,
        routing: RoutingChange | None = ...,
    ) -> list[Generation]: ...
    def generate(
        self,
        prompt: Texts,
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k_tokens: int | None = None,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
        routing: RoutingChange | None = None,
    ) -> Generation | list[Generation]:
        """Continues one prompt, or many at once; greedy at `temperature` 0, else sampled.

        `top_p` and `top_k_tokens` bound what is sampled from; `stop` strings end a text and are left out of it.
        `on_text(row, text)` is told of text as it comes. `routing` is of this call alone, such as
        {"top_k": 1}. Raises InvalidArgument for an empty prompt and for one longer than the experts' context.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        codec, limit = self._members.codec, self.pool.context
        options = GenerateOptions(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k_tokens=top_k_tokens,
            seed=seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            end_tokens=codec.end_ids,
            max_length=limit,
        ).check()
        contexts = [codec.prompt(text, number=n, context=limit) for n, text in enumerate(prompts, start=1)]
        if not contexts:
            return []
        router = self.routed_as(routing)
        decoder = MixtureDecoder(self.pool, router, contexts)
        results = [
            Generation(
                prompt=text,
                completion=found.text,
                token_ids=tuple(found.token_ids),
                finish_reason=found.finish_reason,
            )
            for text, found in zip(
                prompts, generate(decoder, self._members.codec.detokenizer, options, on_text=on_text), strict=True
            )
        ]
        return results[0] if isinstance(prompt, str) else results

    def log_probs(
        self,
        input_ids: torch.Tensor | Sequence[Sequence[int]],
        attention_mask: torch.Tensor | Sequence[Sequence[int]] | None = None,
    ) -> torch.Tensor:
        """The mixture's log-probabilities, [B, T, V], float32: at [b, t], of the token after `input_ids[b, :t + 1]`.

        `input_ids` [B, T] is taken as it is: begin it with the end-of-text token for a text from its start. Weights at
        t are routed on the tokens up to t. `attention_mask` [B, T] is 0 on padding, which may stand anywhere: a column
        of padding repeats what stands after the last token before it, or is uniform where there is none. Holds B·T·V
        numbers; `score` does not.
        """
        import torch

        ids_BT = torch.as_tensor(input_ids, dtype=torch.long)
        batch = TokenBatch.of(ids_BT, None if attention_mask is None else torch.as_tensor(attention_mask))
        batch.check(self.pool)
        return batch_log_probs(self.pool, self.context_router, batch)

    def routed_as(self, change: RoutingChange | None) -> ContextRouter:
        """`context_router` with other options, for one call. Raises InvalidArgument."""
        return self._members.routed(change) if change else self.context_router

    # Between text and tokens

    def sequence_of(self, token_ids: Sequence[int]) -> TokenSequence:
        """A document by its token ids, end-of-text left out, as it is scored."""
        return self._members.codec.sequence_of(token_ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, no special token added."""
        return self._members.codec.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, as it stands: special tokens and spaces are kept."""
        return str(self.tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False))

    def window_and_stride(self, window: int | None = None, stride: int | None = None) -> tuple[int, int]:
        """What scoring uses, in tokens. Raises InvalidArgument when they do not fit the experts or one another."""
        limit = self.pool.context
        trained = self.parts.recipe.sequence_length
        chosen = window if window is not None else trained if limit is None else min(limit, trained)
        if not 1 <= chosen <= (limit or chosen):
            raise InvalidArgument(f"window: {chosen} is not between 1 and the context of {limit}", field="window")
        step = max(1, chosen // 2) if stride is None else stride
        if not 1 <= step <= chosen:
            raise InvalidArgument(f"stride: {step} is not between 1 and the window of {chosen}", field="stride")
        return chosen, step

    def _score(
        self,
        sequences: Sequence[TokenSequence],
        *,
        window: int | None = None,
        stride: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[list[Score], np.ndarray[Any, np.dtype[np.float64]]]:
        length, step = self.window_and_stride(window, stride)
        found, share = mixture_scores(
            self.pool, self.context_router, sequences, window=length, stride=step, progress=progress
        )
        scores = [
            Score(token_ids=sequence.ids[sequence.first :], token_log_probs=tuple(values.tolist()))
            for sequence, values in zip(sequences, found, strict=True)
        ]
        return scores, share
