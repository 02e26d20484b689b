"""Group commit: who arrives while others are written is written next, with all who wait."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from cbtm_common.errors import LeaseLost, Unavailable
from cbtm_coordinator.store.grouping import Group
from tests.support.registry import all_at_once

LONG = 20.0


class Gated:
    """Doubles numbers, in groups; the first group waits until it is let go."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.groups: list[list[int]] = []

    def __call__(self, items: Sequence[int]) -> list[int | Exception]:
        self.groups.append(list(items))
        if len(self.groups) == 1:
            self.entered.set()
            assert self.gate.wait(LONG)
        return [LeaseLost(f"{item} is lost") if item < 0 else 2 * item for item in items]


def _gather(group: Group[int, int], gated: Gated, items: Sequence[int]) -> list[int | BaseException]:
    """Results of `items` called while the first call, with 0, is under way."""
    with ThreadPoolExecutor(len(items) + 1) as pool:
        first = pool.submit(group, 0)
        assert gated.entered.wait(LONG)
        later = [pool.submit(group, item) for item in items]
        while len(group._waiting) < len(items):
            pass
        gated.gate.set()
        assert first.result(LONG) == 0
        return [future.exception(LONG) or future.result() for future in later]


def test_who_waits_is_carried_out_together() -> None:
    gated = Gated()
    assert _gather(Group(gated), gated, range(1, 9)) == [2 * item for item in range(1, 9)]
    assert [sorted(items) for items in gated.groups] == [[0], list(range(1, 9))]


def test_a_group_is_no_larger_than_its_limit() -> None:
    gated = Gated()
    _gather(Group(gated, limit=3), gated, range(1, 9))
    assert [len(items) for items in gated.groups] == [1, 3, 3, 2]


def test_each_gets_its_own_error() -> None:
    gated = Gated()
    good, bad = _gather(Group(gated), gated, [4, -5])
    assert good == 8
    assert isinstance(bad, LeaseLost)
    assert "-5" in bad.message


def test_nobody_fails_for_anothers_sake() -> None:
    calls: list[list[int]] = []

    def execute(items: Sequence[int]) -> list[int | Exception]:
        calls.append(list(items))
        if 3 in items:
            raise ValueError("3 breaks the statement")
        return list(items)

    results = all_at_once(8, Group(execute))
    assert [isinstance(result, ValueError) for result in results] == [i == 3 for i in range(8)]


def test_what_is_unavailable_is_not_tried_again_for_each() -> None:
    gated = Gated()
    tried: list[int] = []

    def execute(items: Sequence[int]) -> list[int | Exception]:
        gated(items)
        tried.append(len(items))
        if len(gated.groups) > 1:
            raise Unavailable("the registry is away")
        return list(items)

    results = _gather(Group(execute), gated, [1, 2, 3])
    assert all(isinstance(result, Unavailable) for result in results)
    assert tried == [1, 3]


def test_after_a_failure_the_next_call_goes_on() -> None:
    outcomes: list[Exception | None] = [ValueError("once"), None]

    def execute(items: Sequence[int]) -> list[int | Exception]:
        error = outcomes.pop(0)
        if error is not None:
            raise error
        return list(items)

    group = Group(execute)
    with pytest.raises(ValueError, match="once"):
        group(1)
    assert group(2) == 2
