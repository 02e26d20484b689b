"""Weights of the mixture: c-BTM's Eq. 2, with its top-k."""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]
_FEW = 8


class Distance(StrEnum):
    # exp(-d² / T), as the paper says.
    SQUARED = "squared"
    # exp(-d⁴ / T), as the authors' code computes: a squared distance, squared again. T does not carry over.
    QUARTIC = "quartic"


def mixture_weights(
    squared_distances: Float64,
    *,
    temperature: float,
    top_k: int | None = None,
    distance: Distance = Distance.SQUARED,
) -> Float64:
    """Weights [N, K] from squared distances [N, K]: w_j ∝ exp(-‖h - c_j‖² / T), kept for the top k, renormalised.

    Rows sum to 1, with zeros outside the top k. Of equal weights the lower index is kept, so the choice is
    deterministic. `top_k` None keeps all.
    """
    exponents = squared_distances**2 if distance is Distance.QUARTIC else squared_distances
    logits = -exponents / temperature
    if top_k is None or top_k >= logits.shape[1]:
        return _softmax(logits)
    # The top k by weight are the top k by logit, so only they are exponentiated.
    order = _top_indices(logits, top_k)
    weights = np.zeros_like(logits)
    np.put_along_axis(weights, order, _softmax(np.take_along_axis(logits, order, axis=1)), axis=1)
    return weights


def keep_top(weights: Float64, top_k: int | None) -> Float64:
    """Keeps the k greatest of each row [N, K] and renormalises; of equals, the lower index."""
    if top_k is None or top_k >= weights.shape[1]:
        return weights
    order = _top_indices(weights, top_k)
    kept = np.zeros_like(weights)
    np.put_along_axis(kept, order, np.take_along_axis(weights, order, axis=1), axis=1)
    kept /= kept.sum(axis=1, keepdims=True)
    return kept


def _softmax(logits: Float64) -> Float64:
    weights: Float64 = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def _top_indices(values: Float64, top_k: int) -> npt.NDArray[np.int64]:
    """Columns of the k greatest of each row, [N, k], the greatest first; of equals, the lower column."""
    if top_k > _FEW:
        return np.argsort(-values, axis=1, kind="stable")[:, :top_k]
    # A pass for each is faster than a sort of all.
    left = values.copy()
    order = np.empty((len(values), top_k), dtype=np.int64)
    for place in range(top_k):
        order[:, place] = left.argmax(axis=1)
        np.put_along_axis(left, order[:, place : place + 1], -np.inf, axis=1)
    return order
