"""A short look at each target of the fuzzer, and all inputs that ever failed. Longer: `python -m tests.fuzz`."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

_EXAMPLES = [(name, number) for name, target in TARGETS.items() for number in range(len(target.examples))]


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_makes_a_reader_do_what_it_must_not(name: str) -> None:
    target = TARGETS[name]

    @given(st.data())
    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def look(data: st.DataObject) -> None:
        target.check(data.draw(target.inputs))

    look()


@pytest.mark.parametrize(("name", "number"), _EXAMPLES)
def test_an_example_holds(name: str, number: int) -> None:
    TARGETS[name].check(TARGETS[name].examples[number])
