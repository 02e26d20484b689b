"""The mixture's next-token distribution for contexts that grow, with keys and values kept for each expert in use.

A batch of B rows is routed anew at every token. Each expert runs once a step, on just the rows whose weights name it.
An expert that enters a row's top k catches up on the tokens that it has not seen, in one forward pass; one that leaves
keeps what it has, for when it comes back. So a step costs the k experts in use, and results are those of running every
expert on the whole context.

`reorder` copies and permutes rows, which is what beam search needs. Only architectures whose cache is keys and values
(not recurrent states) are taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cbtm._mixture import LogMixture, log_softmax
from cbtm._residency import ExpertPool
from cbtm._routing import ContextRouter, ContextState, Float64, Policy
from cbtm_common.errors import InvalidArgument

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache, PreTrainedModel

    # Keys and values [H, T, D] of one row, for each layer.
    _RowCache = tuple[tuple[torch.Tensor, torch.Tensor], ...]


class ExpertCache:
    """One expert's keys and values. Rows in use together are one batch, aligned at the right; others are set aside."""

    def __init__(self) -> None:
        self._active: DynamicCache | None = None
        # Row -> tokens in `_active`, in the order of its batch dimension.
        self._lengths: dict[int, int] = {}
        self._aside: dict[int, _RowCache] = {}

    def seen(self, row: int) -> int:
        """How many of the row's tokens this expert has read."""
        if row in self._lengths:
            return self._lengths[row]
        return int(self._aside[row][0][0].shape[1]) if row in self._aside else 0

    def advance(self, model: PreTrainedModel, contexts: Mapping[int, Sequence[int]], *, keep: int = 1) -> torch.Tensor:
        """Logits after each of the last `keep` tokens of each context, [R, keep, V], in the order of `contexts`.

        Reads the tokens not yet seen; each context has at least one. What stands before a context's unseen tokens,
        where they are fewer than `keep`, means nothing.
        """
        import torch

        unseen = {row: list(ids[self.seen(row) :]) for row, ids in contexts.items()}
        groups: dict[int, list[int]] = {}
        for row, ids in unseen.items():
            # New rows go together, whatever their lengths; the others with those that lag as far behind.
            groups.setdefault(len(ids) if self.seen(row) else 0, []).append(row)
        if len(groups) == 1 and list(contexts) == list(self._lengths):
            return self._forward(model, unseen, keep)
        logits: dict[int, torch.Tensor] = {}
        for group in groups.values():
            self._set_aside()
            self._take_up(group)
            output_RMV = self._forward(model, {row: unseen[row] for row in group}, keep)
            logits.update(zip(group, output_RMV, strict=True))
        return torch.stack([logits[row] for row in contexts])

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row `rows[i]` was."""
        import torch

        if list(rows) == list(self._lengths) and not self._aside:
            return
        self._aside = {new: self._aside[old] for new, old in enumerate(rows) if old in self._aside}
        place = {row: i for i, row in enumerate(self._lengths)}
        kept = [(new, old) for new, old in enumerate(rows) if old in place]
        if self._active is not None and kept:
            keys, _ = self._keys_and_values()[0]
            self._active.batch_select_indices(torch.tensor([place[old] for _, old in kept], device=keys.device))
        elif not kept:
            self._active = None
        self._lengths = {new: self._lengths[old] for new, old in kept}

    def _forward(self, model: PreTrainedModel, unseen: Mapping[int, list[int]], keep: int) -> torch.Tensor:
        import torch
        from transformers import DynamicCache

        device = model.device
        past = self._active.get_seq_length() if self._active is not None else 0
        width = max(keep, *map(len, unseen.values()))
        total = past + width
        lengths = {row: self._lengths.get(row, 0) + len(ids) for row, ids in unseen.items()}
        input_ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in unseen.values()], device=device)
        options: dict[str, Any] = {}
        if any(length != total for length in lengths.values()):
            padding_R1 = torch.tensor([[total - length] for length in lengths.values()], device=device)
            places_1T = torch.arange(total, device=device)[None]
            options["attention_mask"] = (places_1T >= padding_R1).long()
            options["position_ids"] = (places_1T - padding_R1).clamp(min=0)[:, past:]
        if self._active is None:
            # Without the config: all layers keep all tokens, so that rows can be set aside and taken up whole.
            self._active = DynamicCache()
        with torch.inference_mode():
            output = model(
                input_ids=input_ids, past_key_values=self._active, use_cache=True, logits_to_keep=keep, **options
            )
        if type(output.past_key_values) is not DynamicCache:
            raise InvalidArgument(
                f"experts: {type(model).__name__} does not keep plain keys and values, which generation needs",
                field="experts",
            )
        self._active = output.past_key_values
        self._lengths = lengths
        logits_RMV: torch.Tensor = output.logits[:, -keep:]
        return logits_RMV

    def crop(self, lengths: Sequence[int]) -> None:
        """Forgets what row i has beyond `lengths[i]` tokens."""
        self._set_aside()
        for row, layers in list(self._aside.items()):
            if self.seen(row) > lengths[row]:
                self._aside[row] = tuple((k[:, : lengths[row]], v[:, : lengths[row]]) for k, v in layers)

    def _set_aside(self) -> None:
        if self._active is not None:
            layers = self._keys_and_values()
            for place, (row, length) in enumerate(self._lengths.items()):
                # Cloned, so that a row does not keep the whole batch in memory.
                self._aside[row] = tuple(
                    (keys[place, :, -length:].clone(), values[place, :, -length:].clone()) for keys, values in layers
                )
        self._active, self._lengths = None, {}

    def _keys_and_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of the active batch, [R, H, T, D], for each layer."""
        layers: list[Any] = [] if self._active is None else self._active.layers
        return [(layer.keys, layer.values) for layer in layers]

    def _take_up(self, rows: Sequence[int]) -> None:
        """Makes `rows` the batch; all are new, or none is."""
        import torch
        from transformers import DynamicCache

        taken = {row: self._aside.pop(row) for row in rows if row in self._aside}
        if not taken:
            return
        self._lengths = {row: int(layers[0][0].shape[1]) for row, layers in taken.items()}
        total = max(self._lengths.values())
        self._active = DynamicCache()
        for number in range(len(next(iter(taken.values())))):
            batch = []
            for part in (0, 1):
                rows_HTD = [layers[number][part] for layers in taken.values()]
                padded = [torch.nn.functional.pad(t, (0, 0, total - t.shape[1], 0)) for t in rows_HTD]
                batch.append(torch.stack(padded))
            self._active.update(batch[0], batch[1], number)


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
    def weights(self) -> Float64:
        """[B, K], for the next token of each row."""
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
        weights_BMK = np.zeros((len(self._ids), keep, len(self._pool)))
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
                return log_softmax(logits_RMV)
            V, device = logits_RMV.shape[-1], logits_RMV.device
            if mixture is None:
                mixture = LogMixture(B * keep, V, device)
            if everywhere:
                mixture.add(
                    None, log_softmax(logits_RMV).reshape(B * keep, V), torch.from_numpy(weights_BM.reshape(B * keep))
                )
                continue
            here_P = np.flatnonzero(weights_BM[rows].reshape(-1))
            places_P = (np.array(rows)[:, None] * keep + np.arange(keep)).reshape(-1)[here_P]
            mixture.add(
                torch.from_numpy(places_P).to(device),
                log_softmax(logits_RMV.reshape(-1, V)[torch.from_numpy(here_P).to(device)]),
                torch.from_numpy(weights_BM.reshape(-1)[places_P]),
            )
        assert mixture is not None, "weights of a row sum to 1"
        return mixture.result().view(B, keep, -1)
