"""Several devices of one machine train one task: a process for each, `Group` is what one sees of the others.

Each process takes its share of the global batch and adds up its gradient alone; then the processes agree on how that
went, sum their gradients once, and make the same optimizer step. What they agree on goes over gloo, between the hosts,
so that no device is waited for; gradients go over NCCL between CUDA devices. Where the devices share one model
(`sharding`), they meet within each pass, and the first process calls what all do next.

Not covered: starting and ending the processes (`peers`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from enum import IntEnum
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

from cbtm_common.errors import CbtmError
from cbtm_worker.train.last_words import lost, word_left

# A process that is lost is noticed by its closed connection; a slow one is waited for.
_PATIENCE = timedelta(days=1)
# Between the end of a process's connections and its own.
_DEATH_SECONDS = 1.0
_BUCKET_BYTES = 64 << 20


class Call(IntEnum):
    """What the first process has all do next, where the devices share one model."""

    STEP = 0
    SAVE = 1
    SAVE_FINAL = 2
    LEAVE = 3


class Outcome(IntEnum):
    """How a gradient went on one device, the gravest last: that is what all act on."""

    DONE = 0
    NO_COMPILER = 1
    NOT_DETERMINISTIC = 2
    OUT_OF_MEMORY = 3
    # The worker leaves the task.
    STOPPED = 4
    # Of a defect; its process says more.
    FAILED = 5


class GroupStopped(Exception):
    """The worker leaves the task; raised in peers."""


class Group:
    """One device alone: it agrees with itself."""

    rank = 0
    size = 1

    def least(self, values: list[int]) -> list[int]:
        """The smallest of each over all processes."""
        return values

    def agree(self, outcome: Outcome, present: list[bool]) -> tuple[Outcome, list[bool]]:
        """(the gravest outcome; which gradients any process has)."""
        return outcome, present

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Each tensor becomes its sum over all processes, the same bits in all."""

    def call(self, call: Call) -> Call:
        """What the first process calls; `call` is heeded there alone."""
        return call

    def ended(self, error: Exception) -> CbtmError | None:
        """What to raise for `error` when it came of another process's end; None when it is this one's own."""
        return None

    def abort(self) -> None:
        """Gives up what is under way with the others: they are gone, or to be ended. From any thread."""


class ProcessGroup(Group):
    """This process among `size`, which meet through a file in `folder`. One at a time in a process.

    `others`: those that the first process has started.
    """

    def __init__(self, *, rank: int, size: int, folder: Path, cuda: bool, others: Sequence[BaseProcess] = ()) -> None:
        self.rank = rank
        self.size = size
        self.folder = folder
        self.is_aborted = False
        self._others = others
        store = dist.FileStore(str(folder / "store"), size)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_PATIENCE)
        world = dist.group.WORLD
        assert world is not None
        self._hosts: dist.ProcessGroup = world
        # Among the devices.
        self.devices: dist.ProcessGroup = dist.new_group(backend="nccl") if cuda else world

    def least(self, values: list[int]) -> list[int]:
        numbers = torch.tensor(values, dtype=torch.int64)
        self._reduce(numbers, dist.ReduceOp.MIN, self._hosts)
        return [int(n) for n in numbers.tolist()]

    def agree(self, outcome: Outcome, present: list[bool]) -> tuple[Outcome, list[bool]]:
        numbers = torch.tensor([int(outcome), *map(int, present)], dtype=torch.int32)
        self._reduce(numbers, dist.ReduceOp.MAX, self._hosts)
        gravest, *anywhere = numbers.tolist()
        return Outcome(int(gravest)), [bool(n) for n in anywhere]

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        for bucket in _buckets(tensors):
            flat = torch.cat([t.flatten() for t in bucket])
            self._reduce(flat, dist.ReduceOp.SUM, self.devices)
            for tensor, part in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def call(self, call: Call) -> Call:
        number = torch.tensor([call], dtype=torch.int32)
        try:
            dist.broadcast(number, src=0, group=self._hosts)
        except RuntimeError as error:
            raise lost(self.folder, error) from error
        return Call(int(number))

    def send(self, tensor: torch.Tensor) -> None:
        """To the first process's `receive`; in host memory."""
        try:
            dist.send(tensor, dst=0, group=self._hosts)
        except RuntimeError as error:
            raise lost(self.folder, error) from error

    def receive(self, tensor: torch.Tensor, rank: int) -> None:
        """Fills `tensor`, in host memory, with what process `rank` sends."""
        try:
            dist.recv(tensor, src=rank, group=self._hosts)
        except RuntimeError as error:
            raise lost(self.folder, error) from error

    def ended(self, error: Exception) -> CbtmError | None:
        said = word_left(self.folder)
        if said is None and wait([process.sentinel for process in self._others], _DEATH_SECONDS):
            return lost(self.folder, error)
        return said

    def abort(self) -> None:
        self.is_aborted = True
        if self.devices is not self._hosts:
            self.devices.abort()

    def close(self) -> None:
        dist.destroy_process_group()

    def _reduce(self, numbers: torch.Tensor, how: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> None:
        try:
            dist.all_reduce(numbers, how, group=group)
        except RuntimeError as error:
            raise lost(self.folder, error) from error


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Consecutive tensors of one type, together up to 64 MiB where one alone is not larger."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        full = sum(t.nbytes for t in bucket) + tensor.nbytes > _BUCKET_BYTES
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
