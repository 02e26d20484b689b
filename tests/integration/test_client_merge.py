"""Merged models, loaded by transformers with nothing of ours: tiny models of every architecture that is taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.ensembles import VOCABULARY, make_parts, random_texts

pytestmark = pytest.mark.integration

ARCHITECTURES = {"llama": "MixtralForCausalLM", "mistral": "MixtralForCausalLM", "qwen3": "Qwen3MoeForCausalLM"}


def random_model(directory: Path, architecture: str, *, seed: int) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

    kind: Any = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen3": Qwen3Config}[architecture]
    config = kind(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        rms_norm_eps=1e-3,
        bos_token_id=0,
        eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    shutil.rmtree(directory, ignore_errors=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)  # type: ignore[no-untyped-call]
    return directory


def ensemble_of(root: Path, architecture: str, *, seeds: list[int]) -> Any:
    from cbtm._ensemble import Ensemble
    from cbtm._residency import Placement

    parts = make_parts(root, experts=len(seeds))
    for index, seed in enumerate(seeds):
        random_model(root / f"model{index}", architecture, seed=seed)
    return Ensemble._of(parts, Placement(), top_k=None, temperature=None)


def logits(directory: Path, ids: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.inference_mode():
        return type(model).__name__, model(ids).logits


def some_ids() -> Any:
    import torch

    return torch.tensor(np.random.default_rng(0).integers(0, VOCABULARY, size=(3, 24)))


TEXTS = random_texts(60, seed=2, words=(4, 12))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_mixture_of_identical_experts_is_the_dense_model(tmp_path: Path, architecture: str, top_k: int) -> None:
    from transformers import AutoTokenizer

    from cbtm import merge

    model = ensemble_of(tmp_path, architecture, seeds=[7, 7, 7])
    merge(model, tmp_path / "out", method="moe", texts=TEXTS, top_k=top_k)
    name, found = logits(tmp_path / "out", some_ids())
    assert name == ARCHITECTURES[architecture]
    _, expected = logits(tmp_path / "model0", some_ids())
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-5)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_experts_per_tok"] == top_k
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == model.tokenizer.get_vocab()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_each_experts_layers_are_in_the_mixture_and_the_rest_is_averaged(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from cbtm import merge

    model = ensemble_of(tmp_path, "qwen3", seeds=[1, 2, 3])
    merge(model, tmp_path / "out", method="moe", texts=TEXTS)
    found = load_file(tmp_path / "out/model.safetensors")
    experts = [load_file(tmp_path / f"model{i}/model.safetensors") for i in range(3)]
    for layer in (0, 1):
        for i, expert in enumerate(experts):
            for part in ("gate_proj", "up_proj", "down_proj"):
                mine = found[f"model.layers.{layer}.mlp.experts.{i}.{part}.weight"]
                assert torch.equal(mine, expert[f"model.layers.{layer}.mlp.{part}.weight"])
        gate = found[f"model.layers.{layer}.mlp.gate.weight"]
        assert gate.shape == (3, 32)
        np.testing.assert_allclose(gate.norm(dim=-1).numpy(), 32**0.5, rtol=1e-4)
    name = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_allclose(found[name].numpy(), sum(e[name] for e in experts).numpy() / 3, atol=1e-6)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_an_average_and_one_weighted_by_a_text(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from cbtm import merge

    model = ensemble_of(tmp_path, "llama", seeds=[1, 2, 3])
    experts = [load_file(tmp_path / f"model{i}/model.safetensors")["lm_head.weight"] for i in range(3)]
    merge(model, tmp_path / "mean", method="average")
    found = load_file(tmp_path / "mean/model.safetensors")["lm_head.weight"]
    np.testing.assert_allclose(found.numpy(), sum(experts).numpy() / 3, atol=1e-6)
    texts = ["river stone", "theorem number matrix"]
    merge(model, tmp_path / "weighted", method="weighted", texts=texts)
    shares = [{w.index: w.weight for w in model.route(text).weights} for text in texts]
    expected = sum(e * float(np.mean([s.get(i, 0.0) for s in shares])) for i, e in enumerate(experts))
    found = load_file(tmp_path / "weighted/model.safetensors")["lm_head.weight"]
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-6)
    assert logits(tmp_path / "weighted", some_ids())[0] == "LlamaForCausalLM"


def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    from cbtm import AlreadyExists, InvalidArgument, merge
    from cbtm._ensemble import Ensemble
    from cbtm._residency import Placement

    model = ensemble_of(tmp_path / "llama", "llama", seeds=[1, 2])
    parts = make_parts(tmp_path / "gpt2", experts=2, architecture="gpt2")
    other = Ensemble._of(parts, Placement(), top_k=None, temperature=None)
    out = tmp_path / "out"
    for arguments, message in [
        ({"model": other, "method": "moe", "texts": TEXTS}, "'gpt2' has no mixture sibling"),
        ({"model": model, "method": "moe", "texts": ["river"]}, r"no text routes to expert\(s\)"),
        ({"model": model, "method": "moe", "texts": TEXTS, "top_k": 3}, "top_k: 3 is not between 1 and the 2"),
        ({"model": model, "method": "moe"}, "texts: method 'moe' needs some"),
        ({"model": model, "method": "weighted", "texts": [" "]}, "texts: method 'weighted' needs some"),
        ({"model": model, "method": "average", "texts": TEXTS}, "texts: method 'average' takes none"),
        ({"model": model, "method": "average", "top_k": 1}, "top_k: it goes with method 'moe'"),
        ({"model": model, "method": "sum"}, "method: 'sum' is not one of average, weighted, moe"),
    ]:
        with pytest.raises(InvalidArgument, match=message):
            merge(output=out, **arguments)  # type: ignore[arg-type]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpt2", "llama"]
    with pytest.raises(AlreadyExists):
        merge(model, tmp_path / "llama", method="average")


def test_on_the_command_line(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from cbtm._cli import app

    ensemble_of(tmp_path, "llama", seeds=[1, 2]).save(tmp_path / "saved")
    (tmp_path / "texts.txt").write_text("\n".join(text.replace("\n", " ") for text in TEXTS))
    for method, arguments, architecture in [
        ("average", [], "LlamaForCausalLM"),
        ("weighted", ["--text", "river stone"], "LlamaForCausalLM"),
        ("moe", ["--texts", str(tmp_path / "texts.txt"), "--top-k", "1"], "MixtralForCausalLM"),
    ]:
        out = tmp_path / method
        command = ["merge", str(out), "--method", method, "-e", str(tmp_path / "saved"), "--json", *arguments]
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        assert json.loads(result.stdout) == {
            "path": str(out),
            "method": method,
            "experts": 2,
            "architecture": architecture,
        }
        assert logits(out, some_ids())[0] == architecture
