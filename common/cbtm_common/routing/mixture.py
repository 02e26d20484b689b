"""Weights of the mixture: c-BTM's Eq. 2, with its top-k."""

from __future__ import annotations

from enum import StrEnum

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


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
    logits -= logits.max(axis=1, keepdims=True)
    weights = np.exp(logits)
    weights /= weights.sum(axis=1, keepdims=True)
    return keep_top(weights, top_k)


def keep_top(weights: Float64, top_k: int | None) -> Float64:
    """Keeps the k greatest of each row [N, K] and renormalises; of equals, the lower index."""
    if top_k is None or top_k >= weights.shape[1]:
        return weights
    order = np.argsort(-weights, axis=1, kind="stable")[:, :top_k]
    kept = np.zeros_like(weights)
    np.put_along_axis(kept, order, np.take_along_axis(weights, order, axis=1), axis=1)
    kept /= kept.sum(axis=1, keepdims=True)
    return kept
