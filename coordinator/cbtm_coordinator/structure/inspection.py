"""The structural check of one checkpoint: its files are fed in as they stream from the store, in any order.

Guarantees, once `finish` has returned: every tensor is the architecture's, by name, dtype and shape, once, and no other
is there; all values are finite; no flood of subnormals; weights as large as the recipe can have made them since the
checkpoint before; moments within what clipping allows; state.json is of this task and step; configs say the same model
as the base model's and name no code. Everything else raises CheckpointRejected with its evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cbtm_common import strict_json
from cbtm_common.errors import CheckpointRejected, IntegrityError
from cbtm_common.files import FileSpec
from cbtm_common.recipe import OptimizerRecipe
from cbtm_common.safetensors_header import SafetensorsHeader
from cbtm_coordinator.structure.architecture import Architecture, Size, Sizes, TensorSpec
from cbtm_coordinator.structure.bounds import judge_moments, judge_size, reach, shrink
from cbtm_coordinator.structure.manifest import CONFIG, INDEX, OPTIMIZER, STATE, check_manifest, is_weights, rejected
from cbtm_coordinator.structure.statistics import Statistics
from cbtm_coordinator.structure.stream import SafetensorsStream

# What a worker's version of transformers, or its dtype, may honestly change.
_FREE_CONFIG = frozenset({"transformers_version", "dtype", "torch_dtype", "_name_or_path"})
_CODE = ("auto_map", "trust_remote_code", "custom_pipelines")


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What a checkpoint must be. `before` are the sizes of weights at `before_step`, `start` those at step 0."""

    architecture: Architecture
    optimizer: OptimizerRecipe
    # The peak of the schedule.
    learning_rate: float
    step: int
    total_steps: int
    # Fields of state.json that are known.
    state: Mapping[str, object]
    start: Sizes
    before: Sizes
    before_step: int


class Inspection:
    """Of one checkpoint. Not thread-safe. Raises CheckpointRejected as soon as anything is known to be wrong."""

    def __init__(self, expected: Expectation, files: Sequence[FileSpec]) -> None:
        self._expected = expected
        check_manifest(expected.architecture, files, final=expected.step == expected.total_steps)
        self._files = {file.path for file in files}
        self._found: dict[str, str] = {}
        self._index: dict[str, str] | None = None
        self._sizes: dict[str, Size] = {}
        self._first_squares = 0.0
        self._second = 0.0
        steps = expected.step - expected.before_step
        self._reach = reach(expected.optimizer, learning_rate=expected.learning_rate, steps=steps)
        self._shrink = shrink(expected.optimizer, learning_rate=expected.learning_rate, steps=steps)

    def reader(self, file: FileSpec) -> _SafetensorsReader | _JsonReader:
        """Takes the bytes of `file` by `feed(chunk)`, in order, then `finish()`."""
        if file.path == OPTIMIZER:
            wanted = dict(self._expected.architecture.optimizer_tensors())
            on_header: Callable[[SafetensorsHeader], None] = partial(self._moments_header, wanted)
            return _SafetensorsReader(file.path, SafetensorsStream(file.path, file.size, on_header, self._moments))
        if is_weights(file.path):
            on_header = partial(self._weights_header, file.path)
            on_tensor = partial(self._weights, file.path)
            return _SafetensorsReader(file.path, SafetensorsStream(file.path, file.size, on_header, on_tensor))
        return _JsonReader(file.path, partial(self._json, file.path))

    def finish(self) -> Sizes:
        """After all files: the sizes of its weights, which the next checkpoint is compared with."""
        missing = next((name for name in self._expected.architecture.tensors if name not in self._found), None)
        if missing is not None:
            raise rejected("tensors", "model", tensor=missing, found="missing", allowed="one")
        if self._index is not None and self._index != self._found:
            raise rejected("index", INDEX, found="other tensors or files than there are", allowed="what the files hold")
        verdict = judge_moments(self._expected.optimizer, first_squares=self._first_squares, second=self._second)
        if verdict.reason:
            raise rejected(verdict.reason, OPTIMIZER, found=verdict.found, allowed=verdict.allowed)
        return self._sizes

    # Weights

    def _weights_header(self, path: str, header: SafetensorsHeader) -> None:
        for name, entry in header.tensors.items():
            if name in self._found:
                raise rejected("tensors", path, tensor=name, found="in two files", allowed="one")
            _check_spec(path, name, TensorSpec(entry.dtype, entry.shape), self._expected.architecture.tensors.get(name))
            self._found[name] = path.removeprefix("model/")

    def _weights(self, path: str, name: str, found: Statistics) -> None:
        _check_finite(path, name, found)
        size = Size.of(found)
        start = self._expected.start.get(name, Size(0.0))
        before = self._expected.before.get(name, start)
        verdict = judge_size(size, before=before, start=start, reach=self._reach, shrink=self._shrink)
        if verdict.reason:
            raise rejected(verdict.reason, path, tensor=name, found=verdict.found, allowed=verdict.allowed)
        self._sizes[name] = size

    # The optimizer

    def _moments_header(self, wanted: Mapping[str, TensorSpec], header: SafetensorsHeader) -> None:
        for name, entry in header.tensors.items():
            _check_spec(OPTIMIZER, name, TensorSpec(entry.dtype, entry.shape), wanted.get(name))
        missing = next((name for name in wanted if name not in header.tensors), None)
        if missing is not None:
            raise rejected("tensors", OPTIMIZER, tensor=missing, found="missing", allowed="one")

    def _moments(self, name: str, found: Statistics) -> None:
        """Subnormal moments are honest: those of a word not seen for long decay to them."""
        _check_finite(OPTIMIZER, name, found)
        if name.endswith(".step"):
            if found.sum != self._expected.step:
                raise rejected("step", OPTIMIZER, tensor=name, found=f"{found.sum:g}", allowed=f"{self._expected.step}")
        elif name.endswith(".exp_avg_sq"):
            if found.has_negative:
                raise rejected("moments", OPTIMIZER, tensor=name, found="a negative square", allowed="none")
            self._second += found.sum
        else:
            self._first_squares += found.sum_squares

    # JSON

    def _json(self, path: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise rejected("json", path, found=type(value).__name__, allowed="an object")
        if path == STATE:
            self._state(value)
        elif path == INDEX:
            self._weight_map(value)
        else:
            self._config(path, value)

    def _state(self, value: dict[str, Any]) -> None:
        for name, expected in self._expected.state.items():
            if value.get(name) != expected or type(value.get(name)) is not type(expected):
                raise rejected("state", STATE, found=f"{name} {_shown(value.get(name))}", allowed=f"{expected!r}")

    def _weight_map(self, value: dict[str, Any]) -> None:
        weight_map = value.get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) and f"model/{name}" in self._files for name in weight_map.values()
        ):
            raise rejected("index", INDEX, found="a file that is not there", allowed="files of the checkpoint")
        self._index = weight_map

    def _config(self, path: str, value: dict[str, Any]) -> None:
        code = next((name for name in _CODE if value.get(name)), None)
        if code is not None:
            raise rejected("config", path, found=f"{code}, which names code", allowed="none")
        if path != CONFIG:
            return
        base = self._expected.architecture.config
        for name in base.keys() - _FREE_CONFIG:
            if value.get(name) != base[name]:
                raise rejected("config", path, found=f"{name} {_shown(value.get(name))}", allowed=f"{base[name]!r}")


def _check_spec(path: str, name: str, found: TensorSpec, wanted: TensorSpec | None) -> None:
    if wanted is None:
        raise rejected("tensors", path, tensor=name, found=str(found), allowed="no tensor of this name")
    if found != wanted:
        raise rejected("tensors", path, tensor=name, found=str(found), allowed=str(wanted))


def _check_finite(path: str, name: str, found: Statistics) -> None:
    if not found.is_finite:
        raise rejected("finite", path, tensor=name, found="NaN or infinity", allowed="finite values")


def _shown(value: Any) -> str:
    """Of a nest of lists, which may be too deep to print, only that it is one."""
    return type(value).__name__ if isinstance(value, dict | list) else repr(value)


class _SafetensorsReader:
    """What is no safetensors file is no transfer error here: these are the very bytes that were announced."""

    def __init__(self, path: str, stream: SafetensorsStream) -> None:
        self._path = path
        self._stream = stream

    def feed(self, chunk: bytes) -> None:
        try:
            self._stream.feed(chunk)
        except IntegrityError as error:
            raise self._refused(error) from error

    def finish(self) -> None:
        try:
            self._stream.finish()
        except IntegrityError as error:
            raise self._refused(error) from error

    def _refused(self, error: IntegrityError) -> CheckpointRejected:
        found = error.message.removeprefix(f"{self._path}: ")
        return rejected("format", self._path, found=found, allowed="a whole safetensors file")


class _JsonReader:
    """Small files, whose length `check_manifest` has bounded."""

    def __init__(self, path: str, on_value: Callable[[Any], None]) -> None:
        self._path = path
        self._on_value = on_value
        self._text = bytearray()

    def feed(self, chunk: bytes) -> None:
        self._text += chunk

    def finish(self) -> None:
        try:
            value = strict_json.loads(bytes(self._text))
        except ValueError as error:
            raise rejected("json", self._path, found=str(error), allowed="JSON") from error
        self._on_value(value)
