"""Scores models on sequences drawn from token shards: mean cross-entropy of each sequence, in nats a token.

Which sequences is a function of (key, shards, count) alone, so that all who score the same draw score the same. Not
covered: what the numbers mean.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import cross_entropy

from cbtm_common.errors import IntegrityError, InvalidArgument
from cbtm_common.recipe import Precision
from cbtm_common.shards import read_shard
from cbtm_worker.train.computation import computes_bf16
from cbtm_worker.train.model import context_length, load_model, vocabulary_size
from cbtm_worker.train.order import Permutation

# Tokens of a forward pass: little, so that any device that can train the model can score it.
_TOKENS = 8192


def draw_windows(paths: Sequence[Path], *, count: int, sequence_length: int, key: str) -> list[npt.NDArray[np.int64]]:
    """About `count` sequences, as many from each shard, each of at most `sequence_length` + 1 tokens.

    Raises InvalidArgument when the shards hold not one pair of tokens.
    """
    windows: list[npt.NDArray[np.int64]] = []
    for number, path in enumerate(paths):
        tokens = read_shard(path).tokens
        length = min(sequence_length, len(tokens) - 1)
        if length < 1:
            continue
        held = (len(tokens) - 1) // length
        wanted = min(math.ceil(count / len(paths)), held)
        drawn = Permutation(held, f"{key}/{number}".encode())(np.arange(wanted, dtype=np.int64))
        windows += [tokens[start * length : start * length + length + 1].astype(np.int64) for start in drawn]
    if not windows:
        raise InvalidArgument(f"shards: {len(paths)} shards hold no sequence to score", field="shards")
    return windows


def score(
    model_dir: Path,
    windows: Sequence[npt.NDArray[np.int64]],
    *,
    device: str,
    precision: Precision,
    after: Callable[[int], None] = lambda _: None,
) -> npt.NDArray[np.float64]:
    """Mean loss of each window [N], the model in evaluation mode; `after` is told how many were scored just now.

    Raises IntegrityError and InvalidArgument for a model that cannot be loaded or does not
    know the tokens.
    """
    longest = max(len(window) for window in windows) - 1
    model, _ = load_model(model_dir, dropout=None, sequence_length=longest)
    limit = context_length(model.config)
    if limit is not None and longest > limit:
        raise InvalidArgument(f"windows: {longest} tokens are over the model's context of {limit}", field="windows")
    if max(int(window.max()) for window in windows) >= vocabulary_size(model):
        raise IntegrityError("windows: the shards hold token ids that the model does not know")
    place = torch.device(device)
    half = precision is Precision.BF16 and computes_bf16(place)
    model.to(place).eval()  # type: ignore[arg-type]
    losses = np.empty(len(windows), dtype=np.float64)
    with torch.inference_mode():
        for rows in _batches(windows):
            tokens_bS = torch.from_numpy(np.stack([windows[row] for row in rows])).to(place)
            with torch.autocast(place.type, dtype=torch.bfloat16) if half else contextlib.nullcontext():
                logits_bLV = model(input_ids=tokens_bS[:, :-1], use_cache=False).logits
            losses_bL = cross_entropy(logits_bLV.float().transpose(1, 2), tokens_bS[:, 1:], reduction="none")
            losses[rows] = losses_bL.double().mean(dim=1).cpu().numpy()
            after(len(rows))
    return losses


def _batches(windows: Sequence[npt.NDArray[np.int64]]) -> list[list[int]]:
    """Numbers of windows of one length together."""
    by_length: dict[int, list[int]] = {}
    for number, window in enumerate(windows):
        by_length.setdefault(len(window), []).append(number)
    batches = []
    for length, rows in by_length.items():
        size = max(1, _TOKENS // length)
        batches += [rows[start : start + size] for start in range(0, len(rows), size)]
    return batches
