"""Reads the tensors of a plain Hugging Face model directory, one at a time, by memory mapping.

Works for one `model.safetensors` and for sharded checkpoints with an index. Loads no model class, so K experts of any
size can be walked side by side in the memory of one tensor. Only safetensors: a pickled checkpoint is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cbtm_common.errors import IntegrityError, InvalidArgument

if TYPE_CHECKING:
    import torch

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class TensorDirectory:
    """The tensors of one model directory, opened lazily; a context manager.

    Raises InvalidArgument when the directory holds no safetensors, IntegrityError when a file cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: dict[str, Any] = {}
        self._where = self._find()

    def _find(self) -> dict[str, str]:
        index = self.directory / _INDEX
        if index.exists():
            try:
                weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
            except (json.JSONDecodeError, KeyError) as error:
                raise IntegrityError(f"{index} is not a safetensors index: {error!r}") from error
            if any(Path(name).name != name for name in weight_map.values()):
                raise IntegrityError(f"{index} names files outside its directory")
            return dict(weight_map)
        if (self.directory / _SINGLE).exists():
            return dict.fromkeys(self._file(_SINGLE).keys(), _SINGLE)
        raise InvalidArgument(f"{self.directory} has neither {_SINGLE} nor {_INDEX}; is it a model directory?")

    def _file(self, name: str) -> Any:
        if name not in self._open:
            from safetensors import SafetensorError, safe_open

            try:
                self._open[name] = safe_open(str(self.directory / name), framework="pt")
            except (SafetensorError, OSError) as error:
                raise IntegrityError(f"{self.directory / name} cannot be read: {error}") from error
        return self._open[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._open.clear()

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file(self._where[name]).get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Read from the header, without the values."""
        return tuple(self._file(self._where[name]).get_slice(name).get_shape())
