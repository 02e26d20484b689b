"""Experts in memory: mapped and not copied, within their budgets, and the same numbers whatever gives way."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.ensembles import make_parts, random_texts
from tests.support.models import EOS_TOKEN_ID

pytestmark = pytest.mark.integration

IDS = [[EOS_TOKEN_ID, 5, 6, 7]]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_parts(tmp_path_factory.mktemp("experts"), experts=4)


def build(parts: Any, **options: Any) -> Any:
    from cbtm._ensemble import Ensemble
    from cbtm._residency import Placement

    return Ensemble._of(parts, Placement(**options), top_k="all", temperature=None)


def bytes_of(model: Any) -> int:
    return sum(p.numel() * p.element_size() for p in model.pool.get(0).parameters())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_weights_on_the_cpu_are_the_pages_of_their_file(parts: Any) -> None:
    model = build(parts)
    weights = model.pool.sources[2].directory() / "model.safetensors"
    expert = model.pool.get(2)
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, *_, path = line.split(maxsplit=5)
        if os.path.realpath(path) == os.path.realpath(weights):
            mapped.append(tuple(int(at, 16) for at in place.split("-")))
    for name, parameter in expert.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in mapped), f"{name} is a copy"


def test_a_budget_of_the_cpu_holds_as_many_experts_as_fit_and_changes_nothing(parts: Any) -> None:
    whole = build(parts)
    size = bytes_of(whole)
    tight = build(parts, max_memory={"cpu": 2 * size + size // 2})
    for ids in (IDS, [[EOS_TOKEN_ID, 9, 8]]):
        np.testing.assert_allclose(tight.log_probs(ids).numpy(), whole.log_probs(ids).numpy(), atol=1e-6)
    assert len(tight.pool.resident) == 2
    assert tight.pool.loads > 4
    prompts = random_texts(3, seed=3, words=(1, 5))
    assert tight.generate(prompts, max_new_tokens=3) == whole.generate(prompts, max_new_tokens=3)


def test_the_least_recently_used_expert_is_dropped(parts: Any) -> None:
    model = build(parts, max_experts=2)
    for index in (0, 1, 0, 2):
        model.pool.get(index)
    assert model.pool.resident == (0, 2)
    assert model.pool.loads == 3


def test_views_share_the_experts_in_memory(parts: Any) -> None:
    model = build(parts)
    model.log_probs(IDS)
    model.with_routing(top_k=1).log_probs(IDS)
    assert model.pool.loads == 4


def test_in_bfloat16_an_expert_counts_half_its_stored_bytes(parts: Any) -> None:
    size = bytes_of(build(parts))
    model = build(parts, dtype="bfloat16", max_memory={"cpu": 2 * size + 4})
    model.log_probs(IDS)
    assert len(model.pool.resident) == 4


def test_a_map_of_devices_by_expert(parts: Any) -> None:
    model = build(parts, device_map={"expert 1": "cpu"})
    model.log_probs(IDS)
    assert model.pool.get(1).device.type == "cpu"
    assert build(parts, device_map="auto").pool.device.type in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_memory": {"cpu": 100}}, "max_memory: expert . takes .* over the budget of cpu of 100"),
        ({"max_memory": {99: "1GiB"}}, "device: 'cuda:99' does not exist"),
        ({"max_memory": {"cpu": "much"}}, "max_memory: 'much' for cpu is no size"),
        ({"max_memory": {}}, "max_memory: it names no device"),
        ({"max_experts": 0}, "max_experts: 0 is under 1"),
        ({"device_map": {"expert 9": "cpu"}}, "device_map: there is no 'expert 9'"),
        ({"device_map": "balanced"}, "device_map: 'balanced' is not 'auto' or a mapping"),
        ({"device_map": "auto", "device": "cpu"}, "device: give it or device_map"),
        ({"device_map": {"expert 1": "cuda:99"}}, "device: 'cuda:99' does not exist"),
    ],
)
def test_a_budget_or_a_device_that_cannot_be(parts: Any, options: dict[str, Any], message: str) -> None:
    from cbtm import CbtmError

    with pytest.raises(CbtmError, match=message):
        build(parts, **options).log_probs(IDS)
