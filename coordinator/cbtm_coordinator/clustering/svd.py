"""Truncated SVD of a sparse matrix by random projection (Halko, Martinsson & Tropp 2011, algorithm 4.4 and 5.1).

Every product with the matrix is computed by blocks of its rows on all cores; as each row is summed in one place and one
order, the number of cores changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from cbtm_coordinator.clustering.pool import cores

Float32 = npt.NDArray[np.float32]

_OVERSAMPLES = 10
_ITERATIONS = 3
# Of squared lengths, in float32.
_NOISE = 1e-7
# Small enough that no core waits long for the last one.
_ROWS = 2048


def truncated_svd(
    matrix: Any, dimensions: int, *, seed: int, on_share: Callable[[float], None] = lambda _: None
) -> tuple[Float32, Float32]:
    """(V [d, columns], singular values [d]) of a CSR matrix, greatest first; each row's largest entry is positive.

    Beyond the matrix's rank, as far as float32 shows it, both are zero.
    `dimensions` must be under both sides of the matrix. `on_share` hears of the share done.
    """
    rows, columns = matrix.shape
    width = min(dimensions + _OVERSAMPLES, rows, columns)
    products = 2 * _ITERATIONS + 2
    with ThreadPoolExecutor(cores()) as threads:
        forward, backward = _Product(matrix, threads), _Product(matrix.T.tocsr(), threads)
        basis = np.random.default_rng(seed).standard_normal((columns, width), dtype=np.float32)
        for done in range(_ITERATIONS):
            basis = _orthonormal(forward(basis))
            on_share((2 * done + 1) / products)
            basis = _orthonormal(backward(basis))
            on_share((2 * done + 2) / products)
        left = _orthonormal(forward(basis))
        on_share((products - 1) / products)
        small = backward(left)
    # small.T = left.T @ matrix: its few singular vectors come from a width × width eigenproblem.
    wide = small.astype(np.float64)
    squares, vectors = np.linalg.eigh(wide.T @ wide)
    order = np.argsort(-squares)[:dimensions]
    singular = np.zeros(dimensions)
    components = np.zeros((dimensions, columns))
    singular[: len(order)] = np.sqrt(np.maximum(squares[order], 0.0))
    components[: len(order)] = (wide @ vectors[:, order] / np.maximum(singular[: len(order)], 1e-12)).T
    largest = np.abs(components).argmax(axis=1)
    components *= np.where(components[np.arange(dimensions), largest] < 0, -1.0, 1.0)[:, None]
    return components.astype(np.float32), singular.astype(np.float32)


class _Product:
    """A sparse matrix times dense ones."""

    def __init__(self, matrix: Any, threads: ThreadPoolExecutor) -> None:
        self._rows = matrix.shape[0]
        self._blocks = [(start, matrix[start : start + _ROWS]) for start in range(0, self._rows, _ROWS)]
        self._threads = threads

    def __call__(self, dense: Float32) -> Float32:
        result = np.empty((self._rows, dense.shape[1]), dtype=np.float32)

        def one(block: tuple[int, Any]) -> None:
            start, part = block
            result[start : start + _ROWS] = part @ dense

        # Errors of the threads come out here.
        list(self._threads.map(one, self._blocks))
        return result


def _orthonormal(basis: Float32) -> Float32:
    """An orthonormal basis of the columns' span, by their Gram matrix, twice: far faster than QR when it is tall.

    Directions that are noise beside the longest are left out, so there may be fewer columns.
    """
    for _ in range(2):
        squares, vectors = np.linalg.eigh((basis.T @ basis).astype(np.float64))
        kept = squares > _NOISE * squares[-1]
        basis = basis @ (vectors[:, kept] / np.sqrt(squares[kept])).astype(np.float32)
    return basis
