"""What a router is: from text to weights over clusters. The same object shards a corpus and weighs the ensemble.

A kind of router is a subclass of `Router`, registered by its `kind`. It says how a context begins and grows, and what
weights contexts have; the rest follows. Saved as a directory: `router.json` (format, kind, and for which clusters) and
`router.safetensors` (the numbers). Experts are bound to a router's columns by cluster id, never by order of files.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from cbtm_common.errors import IntegrityError
from cbtm_common.routing.mixture import Distance, Float64

FORMAT = "cbtm-router-1"
JSON_NAME = "router.json"
TENSORS_NAME = "router.safetensors"


class RunningState(Protocol):
    """All that a router needs to know of a text that grows at its end. Immutable: texts may branch."""

    def extend(self, text: str) -> RunningState:
        """The state with `text` after it. Its cost does not grow with what came before."""
        ...


class Router(ABC):
    """K clusters, in the order of `cluster_ids`.

    `temperature` (None: the router's own) and `top_k` mean the same for every kind. `distance` is of routers that have
    one: another kind raises InvalidArgument for any but the default.
    """

    kind: ClassVar[str]

    @property
    @abstractmethod
    def cluster_ids(self) -> tuple[str, ...]: ...

    @property
    @abstractmethod
    def temperature(self) -> float: ...

    @abstractmethod
    def begin(self) -> RunningState:
        """The empty context. Its weights are the clusters' prior."""

    @abstractmethod
    def _read_states(self, states: Sequence[RunningState]) -> Float64:
        """[N, ·]: what `_weigh` needs to know of the text that each state stands for."""

    @abstractmethod
    def _weigh(self, read: Float64, top_k: int | None, temperature: float | None, distance: Distance) -> Float64:
        """[N, ·] to weights [N, K]. Rows sum to 1, with zeros outside the top k."""

    @abstractmethod
    def restrict(self, cluster_ids: Sequence[str]) -> Router:
        """The router over these clusters alone, in this order: the others' weight goes to them in proportion."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Writes what `load` reads; see `write_about`."""

    @classmethod
    @abstractmethod
    def load(cls, directory: Path, about: dict[str, Any]) -> Self:
        """From a directory whose `router.json` holds `about`.

        Files that do not fit together raise IntegrityError, or any of ValueError, KeyError and TypeError.
        """

    # What follows from these; a kind that can read whole texts, or all prefixes of one, in a better way does.

    def _read_texts(self, texts: Sequence[str]) -> Float64:
        return self._read_states([self.begin().extend(text) for text in texts])

    def _read_prefixes(self, text: str, ends: Sequence[int]) -> Float64:
        states, state, at = [], self.begin(), 0
        for end in ends:
            if end > at:
                state, at = state.extend(text[at:end]), end
            states.append(state)
        return self._read_states(states)

    def weights(
        self,
        texts: Sequence[str],
        *,
        top_k: int | None = None,
        temperature: float | None = None,
        distance: Distance = Distance.SQUARED,
    ) -> Float64:
        """[N, K]: weights of whole texts. Rows sum to 1, with zeros outside the top k."""
        return self._weigh(self._read_texts(texts), top_k, temperature, distance)

    def prefix_weights(
        self,
        text: str,
        ends: Sequence[int],
        *,
        top_k: int | None = None,
        temperature: float | None = None,
        distance: Distance = Distance.SQUARED,
    ) -> Float64:
        """[T, K]: row t is `weights([text[:ends[t]]])`, for all t in one pass. `ends` must not descend."""
        if any(later < earlier for earlier, later in pairwise(ends)):
            raise ValueError("ends must not descend")
        return self._weigh(self._read_prefixes(text, ends), top_k, temperature, distance)

    def running_weights(
        self,
        states: Sequence[RunningState],
        *,
        top_k: int | None = None,
        temperature: float | None = None,
        distance: Distance = Distance.SQUARED,
    ) -> Float64:
        """[N, K]: weights of the text that each state stands for."""
        return self._weigh(self._read_states(states), top_k, temperature, distance)

    def assign(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Index of the heaviest cluster for each text, [N]: how documents are sharded."""
        nearest: npt.NDArray[np.int64] = self.weights(texts, top_k=1).argmax(axis=1)
        return nearest

    def write_about(self, directory: Path, fields: dict[str, Any]) -> None:
        """`router.json` in `directory`, which is made: what `load_router` needs, and `fields` of this kind."""
        directory.mkdir(parents=True, exist_ok=True)
        about = {"format": FORMAT, "kind": self.kind, "cluster_ids": list(self.cluster_ids), **fields}
        (directory / JSON_NAME).write_text(json.dumps(about, ensure_ascii=False, indent=None), "utf-8")


R = TypeVar("R", bound=Router)
_KINDS: dict[str, type[Router]] = {}


def register_router(router: type[R]) -> type[R]:
    """Class decorator: `load_router` reads what a router of this `kind` has saved."""
    if _KINDS.setdefault(router.kind, router) is not router:
        raise ValueError(f"two kinds of router are named {router.kind!r}")
    return router


def load_router(directory: Path) -> Router:
    """The router saved in `directory`. Raises IntegrityError when it is not one, of no known kind, or damaged."""
    from safetensors import SafetensorError

    try:
        about = json.loads((directory / JSON_NAME).read_text("utf-8"))
        if about["format"] != FORMAT or about["kind"] not in _KINDS:
            raise IntegrityError(
                f"{directory}: a router of format {about['format']!r}, kind {about['kind']!r}; this version of cbtm "
                f"knows {FORMAT!r}, {', '.join(map(repr, sorted(_KINDS)))}"
            )
        return _KINDS[about["kind"]].load(directory, about)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise IntegrityError(f"{directory}: no readable router: {error!r}") from error
