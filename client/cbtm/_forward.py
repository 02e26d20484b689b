"""The mixture's log-probabilities over the whole vocabulary, at many positions of many contexts at once.

What a forward pass without keys and values gives. Contexts may differ in length: each stands for itself, with no
padding in sight of it. Each expert runs once, on just the contexts that use it, from the start of each to the last
position that does. Holds one float32 for each position and token of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

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
            begin = min(int(positions[0]) for _, positions in batch)
            filler = 1 if model.config.get_text_config().pad_token_id == 0 else 0
            ids = [[*contexts[row][:width], *[filler] * (width - len(contexts[row]))] for row, _ in batch]
            with torch.inference_mode():
                logits_RWV = model(
                    input_ids=torch.tensor(ids, device=model.device), use_cache=False, logits_to_keep=width - begin
                ).logits
            at_P = np.concatenate([r * (width - begin) + positions - begin for r, (_, positions) in enumerate(batch)])
            into_P = np.concatenate([starts[row] + positions - firsts[row] for row, positions in batch])
            flat_PV = logits_RWV.reshape(-1, logits_RWV.shape[-1])
            if len(at_P) < len(flat_PV):
                flat_PV = flat_PV[torch.from_numpy(at_P).to(model.device)]
            if mixture is None:
                mixture = LogMixture(len(weights_NK), flat_PV.shape[-1], model.device)
            everywhere = len(into_P) == len(weights_NK)
            mixture.add(
                None if everywhere else torch.from_numpy(into_P).to(model.device),
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
