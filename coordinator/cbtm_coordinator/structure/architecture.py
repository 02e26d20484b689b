"""What the models of a run look like: tensors, shapes and dtypes, config, and how large the base model's weights are.

Learned once from the files of the base model, which the run's owner provides, and kept with the run as JSON.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cbtm_common.errors import IntegrityError, InvalidArgument
from cbtm_common.safetensors_header import ITEM_BYTES, SafetensorsHeader
from cbtm_coordinator.structure.statistics import FLOATS, Statistics

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    dtype: str
    shape: Shape

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class Size:
    """How large a tensor's values are: root mean square, the share of subnormal ones, some values as they are.

    `sampled` are those at `cbtm_common.places`, in float32; none where an older version looked.
    """

    rms: float
    subnormals: float = 0.0
    sampled: tuple[float, ...] = ()

    @classmethod
    def of(cls, statistics: Statistics) -> Size:
        return cls(statistics.rms, statistics.subnormal_share, tuple(statistics.sampled))


# By the name of the tensor.
Sizes = Mapping[str, Size]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """`tensors` are those of a checkpoint's model: workers keep floats as float32, whatever the base model has.

    `trained` are the parameters that the optimizer keeps state of, by the names that the model's modules give them;
    `sizes` are the base model's, for all tensors of floats. Without tensors, checkpoints hold none.
    """

    tensors: Mapping[str, TensorSpec]
    trained: Mapping[str, Shape]
    config: Mapping[str, Any] = field(default_factory=dict)
    sizes: Sizes = field(default_factory=dict)

    @property
    def model_bytes(self) -> int:
        return sum(spec.bytes for spec in self.tensors.values())

    @property
    def optimizer_bytes(self) -> int:
        """Two moments and a step of each trained parameter, float32."""
        return sum(4 * (2 * math.prod(shape) + 1) for shape in self.trained.values())

    def optimizer_tensors(self) -> Iterator[tuple[str, TensorSpec]]:
        for name, shape in self.trained.items():
            yield f"{name}.step", TensorSpec("F32", ())
            yield f"{name}.exp_avg", TensorSpec("F32", shape)
            yield f"{name}.exp_avg_sq", TensorSpec("F32", shape)

    def to_json(self) -> str:
        return json.dumps(
            {
                "tensors": {name: [spec.dtype, spec.shape] for name, spec in self.tensors.items()},
                "trained": self.trained,
                "config": self.config,
                "sizes": _sizes_out(self.sizes),
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> Architecture:
        data = json.loads(text)
        return cls(
            tensors={name: TensorSpec(dtype, tuple(shape)) for name, (dtype, shape) in data["tensors"].items()},
            trained={name: tuple(shape) for name, shape in data["trained"].items()},
            config=data["config"],
            sizes=_sizes_in(data["sizes"]),
        )


def sizes_to_json(sizes: Sizes) -> str:
    return json.dumps(_sizes_out(sizes), separators=(",", ":"))


def sizes_from_json(text: str) -> Sizes:
    return _sizes_in(json.loads(text))


def _sizes_out(sizes: Sizes) -> dict[str, list[float | str]]:
    return {name: [size.rms, size.subnormals, floats_to_text(size.sampled)] for name, size in sizes.items()}


def _sizes_in(data: Mapping[str, list[Any]]) -> Sizes:
    return {
        name: Size(rms, subnormals, *map(floats_from_text, rest)) for name, (rms, subnormals, *rest) in data.items()
    }


def floats_to_text(values: Sequence[float]) -> str:
    """As float32, in base64."""
    with np.errstate(over="ignore"):
        return base64.b64encode(np.asarray(values, "<f4").tobytes()).decode()


def floats_from_text(text: str) -> tuple[float, ...]:
    return tuple(np.frombuffer(base64.b64decode(text), "<f4").tolist())


class ArchitectureBuilder:
    """Gathers an `Architecture` from the headers and statistics of a base model's files."""

    def __init__(self) -> None:
        self._tensors: dict[str, TensorSpec] = {}
        self._sizes: dict[str, Size] = {}
        self.config: Mapping[str, Any] = {}

    def add_header(self, where: str, header: SafetensorsHeader) -> None:
        for name, entry in header.tensors.items():
            if name in self._tensors:
                raise IntegrityError(f"{where}: tensor {name!r} is in another file of the model too")
            self._tensors[name] = TensorSpec("F32" if entry.dtype in FLOATS else entry.dtype, entry.shape)

    def add_tensor(self, where: str, name: str, statistics: Statistics) -> None:
        if not statistics.is_finite:
            raise IntegrityError(
                f"{where}: tensor {name!r} holds values that are not finite: choose another base model"
            )
        self._sizes[name] = Size.of(statistics)

    def build(self, trained: Mapping[str, Shape] | None = None) -> Architecture:
        """`trained` None: every tensor of floats. Raises InvalidArgument when they hold more numbers than the model."""
        if trained is None:
            trained = {name: spec.shape for name, spec in self._tensors.items() if spec.dtype == "F32"}
        most = sum(math.prod(spec.shape) for spec in self._tensors.values())
        if sum(math.prod(shape) for shape in trained.values()) > most:
            raise InvalidArgument(
                f"trained_parameters_json: more parameters than the {most} of the base model",
                field="trained_parameters_json",
            )
        return Architecture(tensors=self._tensors, trained=trained, config=self.config, sizes=self._sizes)
