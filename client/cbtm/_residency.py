"""Which experts are in memory: loaded when first needed, the least recently used dropped when the budget is full.

An expert is a plain Hugging Face directory. Its weights are read from safetensors through the page cache, so a dropped
expert comes back at the speed of memory while the machine has room. Dropping one changes no result: weights are read
only. The budget counts whole experts or bytes of weights; an expert that alone exceeds the bytes is refused.

Not here: where the files come from (`ExpertSource`), nor sharing one expert over several devices.
"""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cbtm_common.errors import IntegrityError, InvalidArgument, ResourceExhausted

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class ExpertSource(Protocol):
    """One expert's files, wherever they are."""

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
    """Where and how experts are held. None: CPU, the stored dtype, no limit."""

    device: str | None = None
    dtype: str | None = None
    max_experts: int | None = None
    max_bytes: int | None = None


class ExpertPool:
    """Models by their place 0..K-1. Thread-safe for loading; models are shared, in evaluation mode.

    Raises InvalidArgument when the experts' configs show that they do not fit together.
    """

    def __init__(self, sources: Sequence[ExpertSource], placement: Placement) -> None:
        for field in ("max_experts", "max_bytes"):
            limit = getattr(placement, field)
            if limit is not None and limit < 1:
                raise InvalidArgument(f"{field}: {limit} is under 1", field=field)
        self.sources = tuple(sources)
        self.placement = placement
        self.device = check_device(placement.device)
        self._dtype = check_dtype(placement.dtype)
        self._resident: OrderedDict[int, PreTrainedModel] = OrderedDict()
        self._lock = threading.RLock()
        self.loads = 0
        check_alike(sources)
        self.config = read_config(sources[0])

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def resident(self) -> tuple[int, ...]:
        """In memory now, least recently used first."""
        return tuple(self._resident)

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
        return sorted(wanted, key=lambda index: (index not in self._resident, index))

    def get(self, index: int) -> PreTrainedModel:
        """The model, loaded if it is not in memory. Raises IntegrityError, NotFound or InvalidArgument."""
        with self._lock:
            if index in self._resident:
                self._resident.move_to_end(index)
                return self._resident[index]
            source = self.sources[index]
            directory = source.directory()
            self._make_room(source, directory)
            model = load_model(directory, name=source.name, device=self.device, dtype=self._dtype)
            self._resident[index] = model
            self.loads += 1
            return model

    @property
    def dtype(self) -> torch.dtype:
        """That experts are used in."""
        import torch

        if self._dtype is not None:
            return self._dtype
        stored = getattr(self.config, "dtype", None)
        return stored if isinstance(stored, torch.dtype) else torch.float32

    def parameters(self) -> int:
        """Of all experts, from the headers of their files (which are fetched if need be)."""
        return sum(_count(source, source.directory())[0] for source in self.sources)

    def move(self, device: torch.device, dtype: torch.dtype) -> None:
        """All experts, those to be loaded included, to another device and dtype."""
        with self._lock:
            if dtype != self.dtype:
                self._dtype = dtype
            self.device = device
            for model in self._resident.values():
                model.to(device, self._dtype)  # type: ignore[arg-type]

    def clear(self) -> None:
        """Drops all from memory."""
        with self._lock:
            self._resident.clear()

    def _make_room(self, source: ExpertSource, directory: Path) -> None:
        limits = self.placement
        while limits.max_experts is not None and len(self._resident) >= limits.max_experts:
            self._resident.popitem(last=False)
        if limits.max_bytes is None:
            return
        need = _count(source, directory, self._dtype)[1]
        if need > limits.max_bytes:
            raise ResourceExhausted(
                f"max_bytes: {source.name} takes {need:,} bytes, over the budget of {limits.max_bytes:,}; "
                "raise it, or choose a smaller dtype"
            )
        while sum(_model_bytes(m) for m in self._resident.values()) + need > limits.max_bytes:
            self._resident.popitem(last=False)


def load_model(directory: Path, *, name: str, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    """A causal language model in evaluation mode on `device`; `dtype` None keeps the stored one.

    Only safetensors and architectures of transformers itself: nothing in the directory is executed.
    Raises IntegrityError when weights are missing, misshapen or unreadable.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, PreTrainedModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        model, info = load(
            directory,
            dtype=dtype if dtype is not None else "auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (ValueError, OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise IntegrityError(f"{name}: {directory} cannot be loaded: {error}") from error
    wrong = sorted(info["missing_keys"]) or sorted(str(key) for key in info["mismatched_keys"])
    if wrong:
        raise IntegrityError(f"{name}: {directory}: {len(wrong)} weights are missing or misshapen: {wrong[0]}")
    assert isinstance(model, PreTrainedModel)
    model.train(False)
    model.requires_grad_(False)
    model.to(device)  # type: ignore[arg-type]
    return model


def check_device(name: str | None) -> torch.device:
    """The device of that name; CPU for None. Raises InvalidArgument when this machine lacks it."""
    import torch

    try:
        device = torch.device(name or "cpu")
    except RuntimeError as error:
        raise InvalidArgument(f"device: {name!r} is no device: {str(error).splitlines()[0]}", field="device") from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        has = "cpu" + "".join(f", cuda:{i}" for i in range(count))
        raise InvalidArgument(
            f"device: {name!r} does not exist here; this machine has {has}", field="device"
        ) from error
    return device


def check_dtype(name: str | None) -> torch.dtype | None:
    """The floating dtype of that name, such as "bfloat16"; None for None or "auto"."""
    import torch

    if name is None or name == "auto":
        return None
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidArgument(f"dtype: {name!r} is not one of float32, bfloat16, float16, auto", field="dtype")
    return dtype


def check_alike(sources: Sequence[ExpertSource]) -> None:
    """Raises InvalidArgument unless all have one architecture and one vocabulary, judged by their config.json."""
    first: dict[str, Any] | None = None
    for source in sources:
        config = _read_json(source)
        shape = {
            "model_type": config.get("model_type"),
            "vocab_size": config.get("vocab_size", config.get("text_config", {}).get("vocab_size")),
        }
        first = first or shape
        for field, value in shape.items():
            if value != first[field]:
                raise InvalidArgument(
                    f"{source.name} and {sources[0].name} do not fit together: {field} is {value!r} in one and "
                    f"{first[field]!r} in the other; experts of one ensemble share architecture and vocabulary",
                    field="experts",
                )


def read_config(source: ExpertSource) -> Any:
    """Its text config, as transformers understands it."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.config_path(), local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise InvalidArgument(f"{source.name}: {source.config_path()}: {error}", field="experts") from error
    return config.get_text_config()


def _read_json(source: ExpertSource) -> dict[str, Any]:
    path = source.config_path()
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{source.name}: {path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise IntegrityError(f"{source.name}: {path} holds no JSON object")
    return config


def _count(source: ExpertSource, directory: Path, dtype: torch.dtype | None = None) -> tuple[int, int]:
    """(numbers, bytes once loaded) of the weights, from the files' headers."""
    from safetensors import SafetensorError, safe_open

    numbers = total = 0
    for path in directory.glob("*.safetensors"):
        try:
            with safe_open(str(path), framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  (not a mapping)
                    part = file.get_slice(key)
                    item = dtype.itemsize if dtype is not None else _ITEM_BYTES.get(part.get_dtype(), 4)
                    numbers += math.prod(part.get_shape())
                    total += math.prod(part.get_shape()) * item
        except (SafetensorError, OSError) as error:
            raise IntegrityError(f"{source.name}: {path} cannot be read: {error}") from error
    return numbers, total


_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


def _model_bytes(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
