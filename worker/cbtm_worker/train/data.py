"""Token shards to batches of a step.

Tokens are read from the files at each batch (a few kilobytes a sequence, from the page cache as a rule): no mapping
and no file descriptor is held, so that a corpus of thousands of shards needs neither. Every shard is read and checked
once, when it is opened. The files must stay in place until training ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cbtm_common.errors import IntegrityError, InvalidArgument
from cbtm_common.shards import read_shard
from cbtm_worker.train.order import SequenceTable, batch_indices


@dataclass(frozen=True)
class _Tokens:
    """Where a shard's token ids lie in its file."""

    path: Path
    dtype: np.dtype[Any]
    offset: int
    count: int


class ShardSet:
    """Sequences of a task's shards, by number.

    Raises IntegrityError for a file that is no token shard, InvalidArgument when a shard's vocabulary exceeds
    `vocab_size` or all of them hold less than one sequence.
    """

    def __init__(self, paths: Sequence[Path], *, sequence_length: int, vocab_size: int) -> None:
        self._length = sequence_length
        self._shards = [_open(Path(path), vocab_size) for path in paths]
        self._table = SequenceTable([shard.count for shard in self._shards], sequence_length)
        if not len(self._table):
            tokens = sum(shard.count for shard in self._shards)
            raise InvalidArgument(
                f"shard_paths: {len(paths)} shards of {tokens} tokens hold not one sequence of {sequence_length} + 1"
                " tokens; use a shorter sequence_length or fewer clusters",
                field="shard_paths",
            )

    def __len__(self) -> int:
        return len(self._table)

    def read(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Tokens of the sequences numbered `indices` [B]; [B, L + 1]."""
        batch = np.empty((len(indices), self._length + 1), dtype=np.int64)
        shards, starts = self._table.locate(indices)
        for row, (number, start) in enumerate(zip(shards.tolist(), starts.tolist(), strict=True)):
            shard = self._shards[number]
            offset = shard.offset + start * shard.dtype.itemsize
            tokens = np.fromfile(shard.path, dtype=shard.dtype, count=self._length + 1, offset=offset)
            if len(tokens) != self._length + 1:
                raise IntegrityError(f"{shard.path}: has become shorter while it was in use")
            batch[row] = tokens
        return batch


def _open(path: Path, vocab_size: int) -> _Tokens:
    shard = read_shard(path)
    if shard.vocab_size > vocab_size:
        raise InvalidArgument(
            f"shard_paths: {path} is tokenized with {shard.vocab_size} ids, the model knows {vocab_size}",
            field="shard_paths",
        )
    tokens = shard.tokens
    if not isinstance(tokens, np.memmap):
        raise IntegrityError(f"{path}: holds no tokens")
    return _Tokens(path=path, dtype=tokens.dtype, offset=tokens.offset, count=len(tokens))


class Batches:
    """Batch n of a task, or some `rows` of it, on its device.

    On CUDA the next one is read ahead, into pinned memory, by a thread.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        global_batch: int,
        seed: int,
        data_key: str,
        device: torch.device,
        rows: slice = slice(None),
    ) -> None:
        self._shards = shards
        self._global_batch = global_batch
        self._rows = rows
        self._seed = seed
        self._data_key = data_key
        self._device = device
        self._ahead: tuple[int, Future[torch.Tensor]] | None = None
        self._reader = ThreadPoolExecutor(1, "cbtm-batches") if device.type == "cuda" else None

    def get(self, step: int) -> torch.Tensor:
        """Token ids [rows, L + 1], int64, on the device."""
        if self._reader is None:
            return self._read(step).to(self._device)
        ahead, self._ahead = self._ahead, None
        batch = ahead[1].result() if ahead is not None and ahead[0] == step else self._read(step)
        self._ahead = (step + 1, self._reader.submit(self._read, step + 1))
        return batch.to(self._device, non_blocking=True)

    def _read(self, step: int) -> torch.Tensor:
        indices = batch_indices(
            step,
            global_batch=self._global_batch,
            sequences=len(self._shards),
            seed=self._seed,
            data_key=self._data_key,
        )
        batch = torch.from_numpy(self._shards.read(indices[self._rows]))
        return batch.pin_memory() if self._device.type == "cuda" else batch

    def close(self) -> None:
        if self._reader is not None:
            self._reader.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
