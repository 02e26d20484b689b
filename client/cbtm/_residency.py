"""Which experts are in memory: loaded when first needed, the least recently used dropped when a budget is full.

An expert is a plain Hugging Face directory. On the CPU its weights are the pages of its safetensors file, mapped and
not copied, so a dropped expert comes back at the speed of memory while the machine has room. Dropping or moving one
changes no result: weights are read only. What gives way to what is decided in `_budget`.

Not here: where the files come from (`ExpertSource`), nor splitting one expert over several devices.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cbtm._alike import check_alike, check_tokenizer
from cbtm._budget import OFFLOAD, MemoryBudget, Move, parse_memory
from cbtm._loading import check_device as check_device
from cbtm._loading import check_dtype as check_dtype
from cbtm._loading import count_weights, read_config
from cbtm._loading import load_model as load_model
from cbtm_common.errors import InvalidArgument

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class ExpertSource(Hashable, Protocol):
    """One expert's files, wherever they are. The same object stands for the same files."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def config_path(self) -> Path:
        """Its config.json alone, without fetching weights."""
        ...

    def directory(self) -> Path:
        """A local, verified model directory; fetched if need be. Raises IntegrityError or NotFound."""
        ...


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where and how experts are held. None: CPU, the stored dtype, no limit.

    `device_map` "auto" spreads experts over all GPUs (the CPU where there is none); a mapping gives some experts, by
    their names, a device each, and the others go to the devices that `max_memory` names, or `device`. `max_memory` is
    bytes of weights for each device, as in transformers: {0: "10GiB", "cpu": "30GiB"}; where a GPU computes, the CPU's
    are for experts that had to give way. Without "cpu" these are read anew from disk.
    """

    device: str | None = None
    dtype: str | None = None
    max_experts: int | None = None
    max_bytes: int | None = None
    max_memory: Mapping[int | str, int | str] | None = None
    device_map: str | Mapping[str, str] | None = None

    def devices(self) -> tuple[dict[str, int | None], int]:
        """(budget of each device that computes, None for no limit; bytes of the CPU for offloaded experts)."""
        if self.device_map is not None and self.device is not None:
            raise InvalidArgument("device: give it or device_map, not both", field="device")
        given = parse_memory(self.max_memory) if self.max_memory is not None else {}
        for name in given:
            check_device(name)
        if isinstance(self.device_map, str) and self.device_map != "auto":
            raise InvalidArgument(f"device_map: {self.device_map!r} is not 'auto' or a mapping", field="device_map")
        fast = [name for name in given if name != "cpu"]
        if self.device is not None:
            names = [str(check_device(self.device))]
        elif fast:
            names = fast
        elif self.device_map == "auto":
            names = [f"cuda:{i}" for i in range(_gpus())] or ["cpu"]
        else:
            names = [] if self.device_map and not given else ["cpu"]
        if isinstance(self.device_map, Mapping):
            names += [name for name in map(str, self.device_map.values()) if name not in names]
        for name in names:
            check_device(name)
        other = set(given) - set(names) - {"cpu"}
        if other:
            raise InvalidArgument(f"max_memory: no expert is on {min(other)}", field="max_memory")
        budgets: dict[str, int | None] = {name: given.get(name) for name in names}
        if self.device_map == "auto" and not fast:
            budgets.update({name: _free(name) for name in names if name != "cpu"})
        return budgets, 0 if "cpu" in names else given.get("cpu", 0)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _free(device: str) -> int:
    """Bytes of that GPU for weights: nine tenths of what is free, as activations and caches need some."""
    import torch

    return int(0.9 * torch.cuda.mem_get_info(device)[0])


class Residency:
    """Models in memory, by their source; what several pools of one ensemble share. Loading is thread-safe.

    A model that is offloaded moves under whoever holds it: with several threads, use one lock around their calls.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        devices, offload = placement.devices()
        self.device = check_device(next(iter(devices)))
        self.chosen_dtype = check_dtype(placement.dtype)
        self._budget = self._fresh_budget(devices, offload)
        self._models: dict[ExpertSource, PreTrainedModel] = {}
        self._lock = threading.RLock()
        self.loads = 0

    @property
    def resident(self) -> tuple[ExpertSource, ...]:
        """On a device that computes, least recently used first."""
        return tuple(source for source in self._budget.resident if source in self._models)

    @property
    def offloaded(self) -> tuple[ExpertSource, ...]:
        return tuple(self._budget.offloaded)  # type: ignore[arg-type]

    def get(self, source: ExpertSource, *, tokenizer: str | None = None) -> PreTrainedModel:
        """The model on its home device. Raises IntegrityError, NotFound, InvalidArgument or ResourceExhausted."""
        with self._lock:
            if self._budget.touch(source):
                return self._models[source]
            directory = source.directory()
            check_tokenizer(directory, tokenizer, name=source.name)
            size = count_weights(source, directory, self.chosen_dtype)[1]
            given = self.placement.device_map
            home = given.get(source.name) if isinstance(given, Mapping) else None
            moves = self._budget.admit(source, size, name=source.name, home=home)
            try:
                for move in moves:
                    self._do(move, directory)
            except BaseException:
                self.drop(source)
                raise
            return self._models[source]

    def _do(self, move: Move, directory: Path) -> None:
        source: ExpertSource = move.key  # type: ignore[assignment]
        if move.to is None:
            self._models.pop(source, None)
        elif source in self._models:
            self._models[source].to("cpu" if move.to == OFFLOAD else move.to)  # type: ignore[arg-type]
        else:
            device = check_device(move.to)
            self._models[source] = load_model(directory, name=source.name, device=device, dtype=self.chosen_dtype)
            self.loads += 1

    def drop(self, source: ExpertSource) -> None:
        """Out of memory, and out of the count."""
        with self._lock:
            self._budget.forget(source)
            self._models.pop(source, None)

    def clear(self) -> None:
        for source in list(self._models):
            self.drop(source)

    def move(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """All experts, those to be loaded included, to one device and dtype; device budgets no longer apply."""
        with self._lock:
            self.clear()
            self.device, self.chosen_dtype = device, dtype
            self.placement = replace(self.placement, device=str(device), device_map=None, max_memory=None)
            self._budget = self._fresh_budget({str(device): None}, 0)

    def _fresh_budget(self, devices: Mapping[str, int | None], offload: int) -> MemoryBudget:
        limits = self.placement
        return MemoryBudget(devices, offload=offload, max_experts=limits.max_experts, max_bytes=limits.max_bytes)


class ExpertPool:
    """An ensemble's experts by their place 0..K-1; models are shared, in evaluation mode. Immutable but for `move`.

    Raises InvalidArgument when the experts' configs show that they do not fit together. `tokenizer` is the digest of
    the ensemble's own, which an expert that brings one must match. `seed`, which may stand in for the experts, has
    place K, and is not counted among them.
    """

    def __init__(
        self,
        sources: Sequence[ExpertSource],
        residency: Residency,
        *,
        tokenizer: str | None = None,
        seed: ExpertSource | None = None,
    ) -> None:
        self.sources = tuple(sources)
        self._with_seed = (*sources, seed) if seed is not None else self.sources
        self.residency = residency
        self._tokenizer = tokenizer
        check_alike(sources)
        self.config = read_config(sources[0])
        given = residency.placement.device_map
        if isinstance(given, Mapping):
            unknown = sorted(set(given) - {source.name for source in sources})
            if unknown:
                raise InvalidArgument(f"device_map: there is no {unknown[0]!r} in this ensemble", field="device_map")

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def placement(self) -> Placement:
        return self.residency.placement

    @property
    def device(self) -> torch.device:
        """Where mixtures are made: that of the experts, the first where there are several."""
        return self.residency.device

    @property
    def loads(self) -> int:
        """How often an expert was read from disk."""
        return self.residency.loads

    @property
    def resident(self) -> tuple[int, ...]:
        """On a device that computes, least recently used first."""
        place = {source: index for index, source in enumerate(self._with_seed)}
        return tuple(place[source] for source in self.residency.resident if source in place)

    @property
    def vocabulary(self) -> int:
        return int(self.config.vocab_size)

    @property
    def context(self) -> int | None:
        """Longest context, in tokens; None when the architecture has no limit of its own."""
        length = getattr(self.config, "max_position_embeddings", None)
        return length if isinstance(length, int) and length > 0 else None

    def order(self, wanted: Sequence[int]) -> list[int]:
        """`wanted` with those in memory first: the order that loads least."""
        here = set(self.resident)
        return sorted(wanted, key=lambda index: (index not in here, index))

    def get(self, index: int) -> PreTrainedModel:
        """The model, loaded if it is not in memory. Raises IntegrityError, NotFound or InvalidArgument."""
        return self.residency.get(self._with_seed[index], tokenizer=self._tokenizer)

    def check_seed(self) -> None:
        """Raises InvalidArgument when the seed's config shows that it does not fit the experts."""
        check_alike((self.sources[0], *self._with_seed[len(self) :]))

    @property
    def dtype(self) -> torch.dtype:
        """That experts are used in."""
        import torch

        if self.residency.chosen_dtype is not None:
            return self.residency.chosen_dtype
        stored = getattr(self.config, "dtype", None)
        return stored if isinstance(stored, torch.dtype) else torch.float32

    def parameters(self) -> int:
        """Of all experts, from the headers of their files (which are fetched if need be)."""
        return sum(count_weights(source, source.directory())[0] for source in self.sources)

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """All experts, those to be loaded included, to another device and dtype."""
        self.residency.move(device, dtype if dtype != self.dtype else self.residency.chosen_dtype)

    def clear(self) -> None:
        """Drops all from memory."""
        self.residency.clear()
