"""The arithmetic of merging, on tensor files alone: no model class is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cbtm_common.errors import InvalidArgument


def write(directory: Path, tensors: dict[str, list[float]], dtype: str = "float32", **config: Any) -> Path:
    import torch
    from safetensors.torch import save_file

    directory.mkdir()
    save_file(
        {k: torch.tensor(v, dtype=getattr(torch, dtype)) for k, v in tensors.items()}, directory / "model.safetensors"
    )
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return directory


def read(directory: Path) -> dict[str, list[float]]:
    from safetensors.torch import load_file

    return {name: tensor.tolist() for name, tensor in load_file(directory / "model.safetensors").items()}


@pytest.mark.parametrize(
    ("weights", "expected"),
    [(None, [2.0, 5.0]), ([3.0, 1.0], [1.5, 3.5]), ([0.0, 2.0], [3.0, 8.0])],
)
def test_an_average_is_weighted_by_shares_of_one(tmp_path: Path, weights: Any, expected: list[float]) -> None:
    from cbtm._merge import average

    a, b = write(tmp_path / "a", {"w": [1.0, 2.0]}), write(tmp_path / "b", {"w": [3.0, 8.0]})
    average([a, b], tmp_path / "out", weights=weights)
    assert read(tmp_path / "out") == {"w": expected}
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"model_type": "llama"}


def test_a_mean_is_taken_in_float32_and_stored_in_the_experts_dtype(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from cbtm._merge import average

    experts = [write(tmp_path / str(i), {"w": [256.0 + 2 * (i == 0)]}, "bfloat16") for i in range(3)]
    average(experts, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")["w"]
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [256.0]  # 256.67, to the nearest of bfloat16; sums in it would have drifted to 258


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0]])
def test_weights_that_are_no_shares_are_refused(tmp_path: Path, weights: list[float]) -> None:
    from cbtm._merge import average

    experts = [write(tmp_path / name, {"w": [1.0]}) for name in "ab"]
    with pytest.raises(InvalidArgument, match="must be 2 numbers, none negative and not all zero"):
        average(experts, tmp_path / "out", weights=weights)


def test_experts_that_differ_in_names_or_shapes_are_refused(tmp_path: Path) -> None:
    from cbtm._merge import average

    a = write(tmp_path / "a", {"w": [1.0]})
    with pytest.raises(InvalidArgument, match=r"differ in tensors: \['v'\]"):
        average([a, write(tmp_path / "b", {"w": [1.0], "v": [1.0]})], tmp_path / "out")
    with pytest.raises(InvalidArgument, match=r"w has shape \(2,\), in .* \(1,\)"):
        average([a, write(tmp_path / "c", {"w": [1.0, 2.0]})], tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' has no mixture sibling in transformers; it works for llama, mistral, qwen3"),
        ({"mlp_bias": True}, "these experts have biases"),
    ],
)
def test_architectures_without_a_mixture_sibling_are_refused(tmp_path: Path, config: Any, message: str) -> None:
    from cbtm._merge import mixture_of_experts

    experts = [write(tmp_path / name, {"w": [1.0]}, **config) for name in "ab"]
    with pytest.raises(InvalidArgument, match=message):
        mixture_of_experts(experts, tmp_path / "out", tokenizer=tmp_path, cluster_texts=[["x"], ["y"]])


def test_a_cluster_without_a_text_and_too_many_experts_a_token_are_refused(tmp_path: Path) -> None:
    from cbtm._merge import mixture_of_experts

    experts = [write(tmp_path / name, {"w": [1.0]}) for name in "ab"]
    with pytest.raises(InvalidArgument, match=r"no text routes to expert\(s\) \[1\]"):
        mixture_of_experts(experts, tmp_path / "out", tokenizer=tmp_path, cluster_texts=[["x"], []])
    with pytest.raises(InvalidArgument, match="top_k: 3 is not between 1 and the 2 experts"):
        mixture_of_experts(experts, tmp_path / "out", tokenizer=tmp_path, cluster_texts=[["x"], ["y"]], top_k=3)
