"""What gives way to what: budgets of several devices and of the CPU, with no device at hand."""

from __future__ import annotations

from collections.abc import Hashable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm._budget import OFFLOAD, MemoryBudget, Move, parse_memory
from cbtm_common.errors import InvalidArgument, ResourceExhausted


def admit(budget: MemoryBudget, key: str, size: int = 10, home: str | None = None) -> list[Move]:
    return budget.admit(key, size, name=f"expert {key}", home=home)


def test_the_least_recently_used_gives_way() -> None:
    budget = MemoryBudget({"cuda:0": 30})
    for key in "abc":
        assert admit(budget, key) == [Move(key, "cuda:0")]
    assert admit(budget, "a") == []
    assert admit(budget, "d") == [Move("b", None), Move("d", "cuda:0")]
    assert budget.resident == ("c", "a", "d")


def test_an_evicted_expert_goes_to_the_cpu_while_its_budget_lasts_then_to_disk() -> None:
    budget = MemoryBudget({"cuda:0": 20}, offload=20)
    for key in "ab":
        admit(budget, key)
    assert admit(budget, "c") == [Move("a", OFFLOAD), Move("c", "cuda:0")]
    assert admit(budget, "d") == [Move("b", OFFLOAD), Move("d", "cuda:0")]
    assert admit(budget, "e") == [Move("a", None), Move("c", OFFLOAD), Move("e", "cuda:0")]
    assert budget.offloaded == ("b", "c")


def test_an_offloaded_expert_changes_places_with_the_one_that_it_drives_out() -> None:
    budget = MemoryBudget({"cuda:0": 10}, offload=10)
    admit(budget, "a")
    admit(budget, "b")
    assert admit(budget, "a") == [Move("b", OFFLOAD), Move("a", "cuda:0")]


def test_an_expert_too_large_for_the_cpus_budget_is_dropped_and_drives_none_out() -> None:
    budget = MemoryBudget({"cuda:0": 20}, offload=10)
    admit(budget, "a", 5)
    admit(budget, "b", 20)
    assert admit(budget, "c", 20) == [Move("b", None), Move("c", "cuda:0")]
    assert budget.offloaded == ("a",)


def test_experts_spread_over_devices_in_proportion_to_their_budgets_and_stay_there() -> None:
    budget = MemoryBudget({"cuda:0": 40, "cuda:1": 20})
    homes = {key: admit(budget, key)[-1].to for key in "abcdef"}
    assert sorted(map(str, homes.values())) == ["cuda:0"] * 4 + ["cuda:1"] * 2
    admit(budget, "g")
    for key, home in homes.items():
        assert all(move.to == home for move in admit(budget, key) if move.key == key)


def test_an_expert_is_on_the_device_that_it_was_given() -> None:
    budget = MemoryBudget({"cuda:0": None, "cuda:1": None})
    assert [admit(budget, key, home="cuda:1")[-1].to for key in "abc"] == ["cuda:1"] * 3
    assert admit(budget, "d")[-1].to == "cuda:0"


def test_a_number_of_experts_counts_over_all_devices() -> None:
    budget = MemoryBudget({"cuda:0": None, "cuda:1": None}, max_experts=2)
    for key in "abc":
        moves = admit(budget, key)
    assert moves == [Move("a", None), Move("c", "cuda:0")]


def test_an_expert_over_a_budget_is_refused_and_nothing_gives_way() -> None:
    budget = MemoryBudget({"cuda:0": 20})
    admit(budget, "a")
    with pytest.raises(
        ResourceExhausted, match=r"max_memory: expert b takes 21 bytes, over the budget of cuda:0 of 20"
    ):
        admit(budget, "b", 21)
    assert budget.resident == ("a",)


@given(
    limits=st.lists(st.one_of(st.none(), st.integers(10, 40)), min_size=1, max_size=3),
    offload=st.one_of(st.none(), st.integers(0, 40)),
    max_experts=st.one_of(st.none(), st.integers(1, 4)),
    calls=st.lists(st.integers(0, 7), max_size=40),
)
@settings(max_examples=60, deadline=None)
def test_after_each_admission_no_budget_is_exceeded_and_the_moves_say_what_is_where(
    limits: list[int | None], offload: int | None, max_experts: int | None, calls: list[int]
) -> None:
    devices = {f"cuda:{i}": limit for i, limit in enumerate(limits)}
    budget = MemoryBudget(devices, offload=offload, max_experts=max_experts)
    held: dict[Hashable, str] = {}
    size = {key: 1 + key for key in range(8)}
    for key in calls:
        for move in budget.admit(key, size[key], name=str(key)):
            held.pop(move.key, None)
            if move.to is not None:
                held[move.key] = move.to
        assert held[key] in devices
        for device, limit in [*devices.items(), (OFFLOAD, offload)]:
            assert limit is None or sum(size[k] for k, at in held.items() if at == device) <= limit  # type: ignore[index]
        resident = {k for k, at in held.items() if at != OFFLOAD}
        assert max_experts is None or len(resident) <= max_experts
        assert resident == set(budget.resident)
        assert set(held) - resident == set(budget.offloaded)


def test_sizes_are_read_as_in_transformers() -> None:
    found = parse_memory({0: "10GiB", "cuda:1": "1.5 GB", "cpu": 7, 2: "500MB"})
    assert found == {"cuda:0": 10 << 30, "cuda:1": 1_500_000_000, "cpu": 7, "cuda:2": 500_000_000}


@pytest.mark.parametrize("size", ["", "ten", "10 parsecs", "1.2.3GB", "0GB", 0, -1])
def test_a_size_that_is_none_is_refused(size: int | str) -> None:
    with pytest.raises(InvalidArgument, match="max_memory"):
        parse_memory({0: size})
