"""Fixtures that several modules share; a module may put its own in their place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cbtm_common.rpc import Connection
from tests.support.coordinator import RunningCoordinator
from tests.support.ensembles import build, make_parts


@pytest.fixture(scope="module")
def admin(coordinator: RunningCoordinator) -> Iterator[Connection]:
    with coordinator.connect(coordinator.token("admin")) as connection:
        yield connection


@pytest.fixture
def any_k(model: Any) -> Iterator[Any]:
    """The module's `model`, an ensemble as one transformers model, with as many experts mixed as asked for."""

    def chosen(top_k: int) -> Any:
        model.set_routing(top_k=top_k)
        return model

    yield chosen
    model.set_routing(top_k=2)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def parts(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_parts(tmp_path_factory.mktemp(request.param), experts=4, architecture=request.param)


@pytest.fixture(scope="module")
def model(parts: Any) -> Any:
    return build(parts)
