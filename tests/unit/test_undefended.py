"""The list of defences that can be taken out is of the code as it stands."""

from __future__ import annotations

import pytest

from tests.undefended.defences import DEFENCES, ROOT, Defence


@pytest.mark.parametrize("defence", DEFENCES, ids=lambda defence: defence.name)
def test_a_defence_stands_where_the_list_says(defence: Defence) -> None:
    assert (ROOT / defence.path).read_text("utf-8").count(defence.line) == 1
    text = (ROOT / defence.test_path).read_text("utf-8")
    assert all(word in text for word in defence.named.split(" or "))


def test_names_are_of_one_defence_each() -> None:
    assert len({defence.name for defence in DEFENCES}) == len(DEFENCES) >= 25
