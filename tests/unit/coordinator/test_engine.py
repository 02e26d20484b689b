"""Engines: what is said when the one asked for is not there."""

from __future__ import annotations

import sys

import pytest

from cbtm_common.errors import InvalidArgument
from cbtm_coordinator.clustering.engine import EngineName, open_engine


def test_without_its_extra_ray_is_refused_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        pytest.raises(InvalidArgument, match=r"pip install 'cbtm\[coordinator,ray\]'") as refused,
        open_engine(EngineName.RAY, processes=1),
    ):
        pass
    assert refused.value.field == "engine"
