"""The centroid router: Eq. 2, its top-k and prior, and what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cbtm_common.errors import IntegrityError, InvalidArgument
from cbtm_common.routing import CentroidRouter, Distance, TermEmbedding, load_router, mixture_weights


def make_router(temperature: float = 0.5) -> CentroidRouter:
    """Three clusters in a plane; each of the terms points along an axis."""
    return CentroidRouter(
        cluster_ids=["r-c0000", "r-c0001", "r-c0002"],
        embedding=TermEmbedding(["east", "north"], np.eye(2, dtype=np.float32)),
        centroids=np.array([[1, 0], [0, 1], [0.1, 0.1]], dtype=np.float32),
        prior=np.array([0.2, 0.3, 0.5], dtype=np.float32),
        temperature=temperature,
    )


def test_weights_are_a_softmax_of_negative_squared_distance_over_temperature() -> None:
    d2 = np.array([0.0, 2.0, 0.9**2 + 0.1**2])
    expected = np.exp(-d2 / 0.5) / np.exp(-d2 / 0.5).sum()
    np.testing.assert_allclose(make_router().weights(["east east"])[0], expected, rtol=1e-6)


def test_the_quartic_distance_squares_the_squared_distance_again() -> None:
    d2 = np.array([0.0, 2.0, 0.9**2 + 0.1**2])
    expected = np.exp(-(d2**2) / 0.5) / np.exp(-(d2**2) / 0.5).sum()
    np.testing.assert_allclose(make_router().weights(["east"], distance=Distance.QUARTIC)[0], expected, rtol=1e-6)


def test_a_temperature_given_is_used_in_place_of_the_routers() -> None:
    np.testing.assert_allclose(make_router(0.5).weights(["east"], temperature=3.0), make_router(3.0).weights(["east"]))


def test_a_low_temperature_neither_overflows_nor_loses_the_sum() -> None:
    weights = make_router().weights(["east north"], temperature=1e-300)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)


def test_top_k_keeps_the_greatest_and_renormalises() -> None:
    all_of_them = make_router().weights(["east"])[0]
    two = make_router().weights(["east"], top_k=2)[0]
    kept = np.argsort(-all_of_them)[:2]
    np.testing.assert_allclose(two[kept], all_of_them[kept] / all_of_them[kept].sum())
    assert np.count_nonzero(two) == 2


def test_of_equal_weights_the_lower_index_is_kept() -> None:
    np.testing.assert_array_equal(mixture_weights(np.ones((1, 4)), temperature=1.0, top_k=1), [[1, 0, 0, 0]])


@pytest.mark.parametrize("text", ["", "   ", "the of a", "unknown words only", "1 2 3"])
def test_a_text_without_a_known_term_gets_the_prior(text: str) -> None:
    np.testing.assert_allclose(make_router().weights([text])[0], [0.2, 0.3, 0.5], rtol=1e-6)
    np.testing.assert_allclose(make_router().weights([text], top_k=1)[0], [0, 0, 1])


def test_assignment_is_the_nearest_centroid() -> None:
    np.testing.assert_array_equal(make_router().assign(["east", "north", "north north east", ""]), [0, 1, 1, 2])


def test_one_cluster_takes_everything() -> None:
    router = CentroidRouter(
        cluster_ids=["only"],
        embedding=TermEmbedding([], np.zeros((0, 1), dtype=np.float32)),
        centroids=np.zeros((1, 1), dtype=np.float32),
        prior=np.ones(1, dtype=np.float32),
    )
    np.testing.assert_array_equal(router.weights(["anything", ""]), [[1.0], [1.0]])
    np.testing.assert_array_equal(router.prefix_weights("any thing", [0, 4], top_k=1), [[1.0], [1.0]])
    np.testing.assert_array_equal(router.assign(["a", "b"]), [0, 0])


def test_restricting_shares_the_others_weight_in_proportion() -> None:
    router = make_router()
    before, after = router.weights(["east"])[0], router.restrict(["r-c0002", "r-c0000"]).weights(["east"])[0]
    np.testing.assert_allclose(after, before[[2, 0]] / before[[2, 0]].sum(), rtol=1e-6)
    np.testing.assert_allclose(router.restrict(["r-c0002", "r-c0000"]).weights([""])[0], [5 / 7, 2 / 7], rtol=1e-6)


@pytest.mark.parametrize("ids", [[], ["r-c0009"], ["r-c0000", "nobody"]])
def test_restricting_to_an_unknown_cluster_is_refused(ids: list[str]) -> None:
    with pytest.raises(InvalidArgument, match="cluster_ids"):
        make_router().restrict(ids)


@pytest.mark.parametrize("sublinear", [False, True])
def test_a_saved_router_weighs_as_before(tmp_path: Path, sublinear: bool) -> None:
    router = make_router()
    router.embedding = TermEmbedding(router.embedding.terms, router.embedding.projection, sublinear=sublinear)
    router.save(tmp_path / "clustering")
    again = load_router(tmp_path / "clustering")
    assert again.cluster_ids == router.cluster_ids
    assert again.temperature == router.temperature
    np.testing.assert_array_equal(
        again.weights(["east", "east east north"]), router.weights(["east", "east east north"])
    )


def _edit(directory: Path, **changes: Any) -> None:
    path = directory / "router.json"
    about = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in about.items() if v is not ...}))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"kind": "neural"},
        {"kind": ...},
        {"terms": ["east"]},
        {"terms": 7},
        {"terms": ["east", "east"]},
        {"terms": ["east", 3]},
        {"cluster_ids": ["r-c0000"]},
        {"cluster_ids": ["a", "a", "b"]},
        {"cluster_ids": ...},
        {"cluster_ids": [1, 2, 3]},
        {"temperature": "warm"},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": None},
        {"sublinear": 1},
    ],
    ids=str,
)
def test_a_router_that_does_not_fit_together_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    make_router().save(tmp_path)
    _edit(tmp_path, **changes)
    with pytest.raises(IntegrityError):
        load_router(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"centroids": np.zeros((2, 2), dtype=np.float32)},
        {"centroids": np.zeros(3, dtype=np.float32)},
        {"centroids": np.full((3, 2), np.nan, dtype=np.float32)},
        {"prior": np.zeros((3, 1), dtype=np.float32)},
        {"prior": np.array([-1, 1, 1], dtype=np.float32)},
        {"prior": np.zeros(3, dtype=np.float32)},
        {"projection": np.zeros(2, dtype=np.float32)},
        {"projection": np.full((2, 2), np.inf, dtype=np.float32)},
        {"projection": np.zeros((2, 2), dtype=np.int64)},
    ],
    ids=str,
)
def test_a_router_with_wrong_numbers_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    make_router().save(tmp_path)
    path = tmp_path / "router.safetensors"
    save_file({**load_file(str(path)), **changes}, str(path))
    with pytest.raises(IntegrityError):
        load_router(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"[" * 200_000])
def test_a_router_json_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    make_router().save(tmp_path)
    (tmp_path / "router.json").write_bytes(content)
    with pytest.raises(IntegrityError):
        load_router(tmp_path)


@pytest.mark.parametrize("name", ["router.json", "router.safetensors"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    make_router().save(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(IntegrityError):
        load_router(tmp_path)


@pytest.mark.parametrize("size", [0, 5, 60])
def test_truncated_numbers_are_refused(tmp_path: Path, size: int) -> None:
    make_router().save(tmp_path)
    path = tmp_path / "router.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(IntegrityError):
        load_router(tmp_path)
