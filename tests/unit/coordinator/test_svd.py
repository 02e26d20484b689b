"""Truncated SVD: that of dense linear algebra, and the same whatever the cores."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from cbtm_coordinator.clustering import svd as module
from cbtm_coordinator.clustering.svd import truncated_svd


def decaying(rows: int, columns: int, seed: int = 0) -> sparse.csr_matrix:
    """A sparse matrix whose singular values fall off."""
    chance = np.random.default_rng(seed)
    dense = chance.normal(size=(rows, columns)) * (chance.random((rows, columns)) < 0.3)
    left, values, right = np.linalg.svd(dense, full_matrices=False)
    del values
    return sparse.csr_matrix((left * 0.7 ** np.arange(left.shape[1])) @ right, dtype=np.float32)


@pytest.mark.parametrize("shape", [(60, 25), (25, 60), (30, 30)])
def test_components_are_those_of_the_dense_svd(shape: tuple[int, int]) -> None:
    matrix = decaying(*shape)
    components, singular = truncated_svd(matrix, 5, seed=1)
    _, expected, right = np.linalg.svd(matrix.toarray(), full_matrices=False)
    np.testing.assert_allclose(singular, expected[:5], rtol=1e-3)
    np.testing.assert_allclose(np.abs((components * right[:5]).sum(axis=1)), 1.0, atol=1e-3)
    assert (components[np.arange(5), np.abs(components).argmax(axis=1)] > 0).all()


def test_blocks_and_cores_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = decaying(50, 40)
    whole, _ = truncated_svd(matrix, 4, seed=3)
    monkeypatch.setattr(module, "_ROWS", 7)
    monkeypatch.setattr(module, "cores", lambda: 1)
    alone, _ = truncated_svd(matrix, 4, seed=3)
    monkeypatch.setattr(module, "cores", lambda: 5)
    shared, _ = truncated_svd(matrix, 4, seed=3)
    np.testing.assert_array_equal(alone, shared)
    np.testing.assert_array_equal(alone, whole)


def test_the_share_done_rises_to_the_end() -> None:
    told: list[float] = []
    truncated_svd(decaying(20, 20), 3, seed=0, on_share=told.append)
    assert told == sorted(told)
    assert 0 < told[0] < told[-1] < 1


def test_a_matrix_of_lower_rank_gives_no_noise() -> None:
    matrix = sparse.csr_matrix(np.outer(np.ones(9), np.arange(12)), dtype=np.float32)
    components, singular = truncated_svd(matrix, 3, seed=0)
    assert np.isfinite(components).all()
    assert singular[0] > 1
    assert (singular[1:] < 1e-3).all()
