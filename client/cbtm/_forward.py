"""The mixture's log-probabilities over the whole vocabulary, at many positions of many contexts at once.

What a forward pass without keys and values gives. Contexts may differ in length: each stands for itself, with no
padding in sight of it. Each expert runs once, on just the contexts that use it, from the start of each to the last
position that does. Holds one float32 for each position and token of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from cbtm._mixture import LogMixture, log_softmax
from cbtm._residency import ExpertPool
from cbtm._routing import ContextRouter, Policy
from cbtm_common.errors import InvalidArgument

if TYPE_CHECKING:
    import torch

# Bytes of one expert's float32 logits at a time, beside the result.
_LOGIT_BYTES = 128 << 20
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenBatch:
    """Rows of token ids as [B, T], of which some columns are padding, anywhere."""

    # The tokens of each row, without padding.
    rows: list[list[int]]
    columns: int
    # Which columns are tokens, [B, T] on the CPU; None: all.
    mask: torch.Tensor | None

    @classmethod
    def of(cls, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None) -> Self:
        """The mask may have columns before the first of the ids. Raises InvalidArgument."""
        if ids_BT.ndim != 2 or ids_BT.numel() == 0:
            raise InvalidArgument(f"input_ids: a shape [B, T] is needed, not {list(ids_BT.shape)}", field="input_ids")
        B, T = ids_BT.shape
        rows = ids_BT.tolist()
        if mask_BT is not None:
            if mask_BT.ndim != 2 or mask_BT.shape[0] != B or mask_BT.shape[1] < T:
                raise InvalidArgument(
                    f"attention_mask: its shape {list(mask_BT.shape)} does not fit input_ids, {[B, T]}",
                    field="attention_mask",
                )
            mask_BT = mask_BT[:, -T:].cpu().bool()
            mask_BT = None if bool(mask_BT.all()) else mask_BT
        if mask_BT is not None:
            both = zip(rows, mask_BT.tolist(), strict=True)
            rows = [[token for token, real in zip(row, mask, strict=True) if real] for row, mask in both]
        return cls(rows, T, mask_BT)

    def check(self, pool: ExpertPool, before: Sequence[int] = ()) -> None:
        """Raises InvalidArgument for what experts cannot read, after `before` tokens of each row."""
        for place, row in enumerate(self.rows):
            if not row:
                raise InvalidArgument(
                    f"attention_mask: row {place + 1} has no token; an empty prompt needs at least one",
                    field="input_ids",
                )
            if min(row) < 0 or max(row) >= pool.vocabulary:
                raise InvalidArgument(f"input_ids: ids are from 0 to {pool.vocabulary - 1}", field="input_ids")
            length = len(row) + (before[place] if before else 0)
            if pool.context is not None and length > pool.context:
                raise InvalidArgument(
                    f"input_ids: row {place + 1} has {length} tokens, and the experts' context holds {pool.context}",
                    field="input_ids",
                )

    def after(self, columns_C: torch.Tensor) -> torch.Tensor:
        """Which of its tokens each of these columns stands after, [B, C]; -1 before the first."""
        if self.mask is None:
            return columns_C.expand(len(self.rows), -1)
        return self.mask.long().cumsum(-1)[:, columns_C] - 1


def batch_log_probs(
    pool: ExpertPool, router: ContextRouter, batch: TokenBatch, columns_C: torch.Tensor | None = None
) -> torch.Tensor:
    """[B, C, V], float32: of the token after each of `columns_C` (default: every column) in each row.

    A column of padding repeats what stands after the last token before it, or is uniform where there is none.
    """
    import torch

    after_BC = batch.after(torch.arange(batch.columns) if columns_C is None else columns_C)
    firsts = [int(after_C.clamp(min=0).min()) for after_C in after_BC]
    log_probs_NV = position_log_probs(pool, router, batch.rows, firsts)
    starts = [0]
    for row, first in zip(batch.rows, firsts, strict=True):
        starts.append(starts[-1] + len(row) - first)
    at_BC = after_BC + (torch.tensor(starts[:-1]) - torch.tensor(firsts)).unsqueeze(-1)
    if at_BC.numel() == len(log_probs_NV) and bool((at_BC.flatten() == torch.arange(at_BC.numel())).all()):
        return log_probs_NV.view(*at_BC.shape, -1)
    return gathered(log_probs_NV, at_BC, after_BC)


def gathered(log_probs_NV: torch.Tensor, at_BC: torch.Tensor, after_BC: torch.Tensor) -> torch.Tensor:
    """Rows `at_BC` of the log-probabilities, [B, C, V]; uniform where no token stands before the column."""
    device = log_probs_NV.device
    found_BCV = log_probs_NV[at_BC.clamp(min=0).to(device)]
    found_BCV[(after_BC < 0).to(device)] = -math.log(log_probs_NV.shape[-1])
    return found_BCV


def position_log_probs(
    pool: ExpertPool, router: ContextRouter, contexts: Sequence[Sequence[int]], firsts: Sequence[int]
) -> torch.Tensor:
    """[N, V], float32: for each context b in turn, and each t from `firsts[b]` to its end, of the token after t.

    Weights at t are routed on the tokens up to t. Raises InvalidArgument for policy `prompt`, which needs one.
    """
    import torch

    if router.options.policy is Policy.PROMPT:
        raise InvalidArgument(
            "policy: 'prompt' has no prompt here; use 'prefix', or generate with use_cache", field="policy"
        )
    # The id put after each context stands for the token to predict; no weight looks at it.
    weights_NK = np.concatenate(
        [router.positions([*ids, 0], first + 1) for ids, first in zip(contexts, firsts, strict=True)]
    )
    counts = [len(ids) - first for ids, first in zip(contexts, firsts, strict=True)]
    starts = np.cumsum([0, *counts])
    mixture: LogMixture | None = None
    for expert in pool.order(np.flatnonzero(weights_NK.any(axis=0)).tolist()):
        model = pool.get(expert)
        used: list[tuple[int, Int64]] = []
        for row, first in enumerate(firsts):
            places = np.flatnonzero(weights_NK[starts[row] : starts[row + 1], expert])
            if len(places):
                used.append((row, places + first))
        for batch in _batches(used, pool.vocabulary):
            width = max(int(positions[-1]) + 1 for _, positions in batch)
            # Only where some row needs them are there logits.
            kept = np.unique(np.concatenate([positions for _, positions in batch]))
            filler = 1 if model.config.get_text_config().pad_token_id == 0 else 0
            ids = [[*contexts[row][:width], *[filler] * (width - len(contexts[row]))] for row, _ in batch]
            with torch.inference_mode():
                logits_RWV = model(
                    input_ids=torch.tensor(ids, device=model.device),
                    use_cache=False,
                    logits_to_keep=torch.from_numpy(kept).to(model.device),
                ).logits
            at_P = np.concatenate(
                [r * len(kept) + np.searchsorted(kept, positions) for r, (_, positions) in enumerate(batch)]
            )
            into_P = np.concatenate([starts[row] + positions - firsts[row] for row, positions in batch])
            flat_PV = logits_RWV.reshape(-1, logits_RWV.shape[-1])
            if len(at_P) < len(flat_PV):
                flat_PV = flat_PV[torch.from_numpy(at_P).to(model.device)]
            if mixture is None:
                mixture = LogMixture(len(weights_NK), flat_PV.shape[-1], pool.device)
            everywhere = len(into_P) == len(weights_NK)
            mixture.add(
                None if everywhere else torch.from_numpy(into_P).to(pool.device),
                log_softmax(flat_PV),
                torch.from_numpy(weights_NK[into_P, expert]),
            )
    assert mixture is not None, "weights of a position sum to 1"
    return mixture.result()


def _batches(used: Sequence[tuple[int, Int64]], vocabulary: int) -> Iterator[list[tuple[int, Int64]]]:
    """Cuts rows so that the logits of a batch stay within bounds (one row always passes); rows keep their order."""
    batch: list[tuple[int, Int64]] = []
    width = 0
    for item in used:
        longest = max(width, int(item[1][-1]) + 1)
        if batch and (len(batch) + 1) * longest * vocabulary * 4 > _LOGIT_BYTES:
            yield batch
            batch, longest = [], int(item[1][-1]) + 1
        batch.append(item)
        width = longest
    if batch:
        yield batch
