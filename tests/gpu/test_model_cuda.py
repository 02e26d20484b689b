"""The ensemble on CUDA devices: the CPU's numbers, offload within budgets, and experts on several devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.ensembles import make_parts, random_texts
from tests.support.models import EOS_TOKEN_ID

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cbtm._ensemble import Ensemble
    from cbtm._residency import Placement

    root = tmp_path_factory.mktemp("cuda")
    Ensemble._of(make_parts(root, experts=4), Placement(), top_k=2, temperature=None).save(root / "saved")
    return root / "saved"


def load(folder: Path, **options: Any) -> Any:
    from cbtm import CbtmForCausalLM

    return CbtmForCausalLM.from_pretrained(folder, **options)


def batch_of(model: Any) -> dict[str, Any]:
    rows = [[EOS_TOKEN_ID, *model.ensemble.encode(text)] for text in random_texts(4, seed=3, words=(2, 6))]
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]).to(model.device),
    }


def expert_bytes(folder: Path) -> int:
    return int((folder / "experts/0000/model.safetensors").stat().st_size)


def test_log_probabilities_are_the_cpus(folder: Path) -> None:
    here, there = load(folder), load(folder, device_map="cuda:0")
    found = there(**batch_of(there)).logits
    assert found.device.type == "cuda"
    np.testing.assert_allclose(found.cpu().numpy(), here(**batch_of(here)).logits.numpy(), atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generation_in_a_batch_goes_on_with_its_caches(folder: Path, dtype: str) -> None:
    model = load(folder, device_map="cuda:0", dtype=dtype)
    options = {"max_new_tokens": 12, "pad_token_id": EOS_TOKEN_ID, "eos_token_id": None}
    batch = batch_of(model)
    found = model.generate(**batch, **options, output_logits=True, return_dict_in_generate=True)
    assert found.sequences.device.type == "cuda"
    # In bfloat16 a near-tie may fall either way, so the distributions are compared and not the choices.
    columns = found.sequences.shape[1] - 12
    mask = torch.cat([batch["attention_mask"], torch.ones_like(found.sequences[:, columns:])], dim=1)
    whole = model(found.sequences, mask).logits[:, columns - 1 : -1]
    tolerance = 1e-3 if dtype == "float32" else 0.1
    np.testing.assert_allclose(
        torch.stack(found.logits, dim=1).float().cpu().numpy(), whole.float().cpu().numpy(), atol=tolerance
    )


def test_within_a_budget_experts_give_way_to_the_cpu_and_come_back_unchanged(folder: Path) -> None:
    whole = load(folder, device_map="cuda:0")
    size = expert_bytes(folder)
    tight = load(folder, num_experts_per_tok=4, max_memory={0: 2 * size, "cpu": 2 * size})
    expected = whole(**batch_of(whole), routing={"top_k": "all"}).logits
    for _ in range(3):
        found = tight(**batch_of(tight)).logits
        assert torch.equal(found, expected)
    residency = tight.ensemble.pool.residency
    assert len(residency.resident) == 2
    assert len(residency.offloaded) == 2
    assert residency.loads == 4, "an offloaded expert is not read from disk again"


def test_a_dropped_expert_leaves_its_memory(folder: Path) -> None:
    model = load(folder, num_experts_per_tok=4, device_map="cuda:0", max_experts=1)
    model(**batch_of(model))
    torch.cuda.synchronize()
    held = sum(p.numel() * p.element_size() for p in model.ensemble.pool.get(0).parameters())
    before = torch.cuda.memory_allocated()
    model.ensemble.pool.clear()
    assert before - torch.cuda.memory_allocated() < 2 * held


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices")
def test_experts_on_two_devices_give_what_one_gives(folder: Path) -> None:
    one = load(folder, device_map="cuda:0", num_experts_per_tok=4)
    options = {"max_new_tokens": 12, "pad_token_id": EOS_TOKEN_ID}
    expected = one.generate(**batch_of(one), **options).tolist()
    for two in (
        load(folder, device_map={i: f"cuda:{i % 2}" for i in range(4)}, num_experts_per_tok=4),
        load(folder, device_map="auto", num_experts_per_tok=4),
        load(folder, max_memory={0: "1GiB", 1: "1GiB"}, num_experts_per_tok=4),
    ):
        assert two.generate(**batch_of(two), **options).tolist() == expected
        assert {two.ensemble.pool.get(i).device.index for i in range(4)} == {0, 1}
