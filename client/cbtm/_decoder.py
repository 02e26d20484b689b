"""The mixture's next-token distribution for contexts that grow, with keys and values kept for each expert in use.

A batch of B rows is routed anew at every token. Each expert runs once a step, on just the rows whose weights name it.
An expert that enters a row's top k catches up on the tokens that it has not seen, in that same pass; one that leaves
keeps what it has, for when it comes back. So a step costs the k experts in use, and results are those of running every
expert on the whole context. Experts and routing are those of the start, whatever becomes of the ensemble meanwhile.

`reorder` copies and permutes rows, which is what beam search needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cbtm._expert_cache import ExpertCache
from cbtm._mixture import LogMixture, log_softmax
from cbtm._residency import ExpertPool
from cbtm._routing import ContextRouter, ContextState, Float64, Policy

if TYPE_CHECKING:
    import torch


class MixtureDecoder:
    """B growing contexts and the mixture's log-probabilities of what comes next."""

    def __init__(self, pool: ExpertPool, router: ContextRouter, contexts: Sequence[Sequence[int]]) -> None:
        self._pool = pool
        self._router = router
        self._ids = [list(ids) for ids in contexts]
        # Of each row, after its last token; None until first asked for.
        self._states: list[ContextState | None] = [None] * len(self._ids)
        self._caches: dict[int, ExpertCache] = {}
        self._weights: Float64 | None = None
        self._log_probs: torch.Tensor | None = None

    @property
    def contexts(self) -> Sequence[Sequence[int]]:
        return self._ids

    @property
    def router(self) -> ContextRouter:
        return self._router

    @property
    def weights(self) -> Float64:
        """[B, W], for the next token of each row; W as `ContextRouter.columns`."""
        if self._weights is None:
            self._weights = self._router.weights([self._state(row) for row in range(len(self._ids))])
        return self._weights

    def log_probs(self) -> torch.Tensor:
        """log p(next token), [B, V], float32, on the pool's device."""
        if self._log_probs is None:
            self._log_probs = self._mix(self.weights[:, None], keep=1)[:, 0]
        return self._log_probs

    def push(self, tokens: Sequence[int]) -> None:
        """One more token for every row."""
        for row, token in enumerate(tokens):
            self._states[row] = self._router.push(self._state(row), token)
            self._ids[row].append(token)
        self._weights = self._log_probs = None

    def extend(self, tokens: Sequence[Sequence[int]], keep: int) -> torch.Tensor:
        """At least one more token for every row; log-probabilities after each of the last `keep`, [B, keep, V].

        Row b has `min(keep, len(tokens[b]))` of them, at the end; before them stands -inf.
        """
        states = [self._follow(row, new, min(keep, len(new))) for row, new in enumerate(tokens)]
        # All at once: routing costs about the same for one context as for many.
        weights_PK = self._router.weights([state for of_row in states for state in of_row])
        weights_BMK = np.zeros((len(self._ids), keep, weights_PK.shape[1]))
        at = 0
        for row, of_row in enumerate(states):
            weights_BMK[row, keep - len(of_row) :] = weights_PK[at : at + len(of_row)]
            at += len(of_row)
        log_probs_BMV = self._mix(weights_BMK, keep=keep)
        self._weights, self._log_probs = weights_BMK[:, -1], log_probs_BMV[:, -1]
        return log_probs_BMV

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row `rows[i]` was: to drop finished rows, or to follow beams."""
        self._ids = [list(self._ids[row]) for row in rows]
        self._states = [self._states[row] for row in rows]
        for cache in self._caches.values():
            cache.reorder(rows)
        if self._weights is not None:
            self._weights = self._weights[list(rows)]
        if self._log_probs is not None:
            self._log_probs = self._log_probs[list(rows)]

    def crop(self, tokens: int) -> None:
        """Takes the last `tokens` tokens off every row, which must have more."""
        for row, ids in enumerate(self._ids):
            del ids[len(ids) - tokens :]
            # Under policy `prompt` the weights were settled before these tokens came.
            if self._router.options.policy is Policy.PREFIX:
                self._states[row] = None
        for cache in self._caches.values():
            cache.crop([len(ids) for ids in self._ids])
        self._weights = self._log_probs = None

    def _state(self, row: int) -> ContextState:
        state = self._states[row]
        if state is None:
            state = self._states[row] = self._router.start(self._ids[row])
        return state

    def _follow(self, row: int, new: Sequence[int], keep: int) -> list[ContextState]:
        """Appends `new` to a row, and gives the states after each of its last `keep` tokens."""
        state, ids = self._states[row], self._ids[row]
        ids.extend(new)
        states: list[ContextState] = []
        if state is None:
            # Where weights stay as they are, the prompt is all that came first.
            grows = self._router.options.policy is Policy.PREFIX
            known = len(ids) - keep + 1 if grows else len(ids)
            state = self._router.start(ids[:known])
            new = ids[known:]
            states.append(state)
        if state.settled is not None:
            states = [state] * keep
        else:
            for token in new:
                state = self._router.push(state, token)
                states.append(state)
        self._states[row] = state
        return states[-keep:]

    def _mix(self, weights_BMK: Float64, *, keep: int) -> torch.Tensor:
        import torch

        used = np.flatnonzero(weights_BMK.any(axis=(0, 1))).tolist()
        B = len(self._ids)
        mixture: LogMixture | None = None
        for expert in self._pool.order(used):
            weights_BM = weights_BMK[:, :, expert]
            rows = np.flatnonzero(weights_BM.any(axis=1)).tolist()
            cache = self._caches.setdefault(expert, ExpertCache())
            logits_RMV = cache.advance(self._pool.get(expert), {row: self._ids[row] for row in rows}, keep=keep)
            everywhere = bool((weights_BM > 0).all())
            if len(used) == 1 and everywhere:
                return log_softmax(logits_RMV).to(self._pool.device)
            V, device = logits_RMV.shape[-1], logits_RMV.device
            if mixture is None:
                mixture = LogMixture(B * keep, V, self._pool.device)
            if everywhere:
                mixture.add(
                    None, log_softmax(logits_RMV).reshape(B * keep, V), torch.from_numpy(weights_BM.reshape(B * keep))
                )
                continue
            here_P = np.flatnonzero(weights_BM[rows].reshape(-1))
            places_P = (np.array(rows)[:, None] * keep + np.arange(keep)).reshape(-1)[here_P]
            mixture.add(
                torch.from_numpy(places_P).to(self._pool.device),
                log_softmax(logits_RMV.reshape(-1, V)[torch.from_numpy(here_P).to(device)]),
                torch.from_numpy(weights_BM.reshape(-1)[places_P]),
            )
        assert mixture is not None, "weights of a row sum to 1"
        return mixture.result().view(B, keep, -1)
