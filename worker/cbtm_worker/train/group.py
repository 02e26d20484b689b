"""Several devices of one machine train one task: a process for each, the same weights in all.

Each process takes its share of the global batch and adds up its gradient alone; then the processes agree on how that
went, sum their gradients once, and make the same optimizer step. What they agree on goes over gloo, between the hosts,
so that no device is waited for; gradients go over NCCL between CUDA devices. The first process is the worker's own; the
others (peers) know nothing of leases or checkpoints, do what it does, and end with it.

Not covered: models that do not fit one device.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from enum import IntEnum
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
import torch.distributed as dist

from cbtm_common.errors import CbtmError, InternalError
from cbtm_common.signals import ending_signals
from cbtm_worker.train.errors import OutOfDeviceMemory
from cbtm_worker.train.job import TrainJob

_log = logging.getLogger(__name__)
# For a peer to import torch.
_START_SECONDS = 300.0
_POLL = timedelta(seconds=0.2)
# A process that is lost is noticed by its closed connection; a slow one is waited for.
_PATIENCE = timedelta(days=1)
_END_SECONDS = 30.0
_BUCKET_BYTES = 64 << 20


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


class ProcessGroup(Group):
    """This process among `size`, which meet through a file in `folder`. One at a time in a process."""

    def __init__(self, *, rank: int, size: int, folder: Path, cuda: bool) -> None:
        self.rank = rank
        self.size = size
        self.folder = folder
        store = dist.FileStore(str(folder / "store"), size)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_PATIENCE)
        self._gradients = dist.new_group(backend="nccl") if cuda else dist.group.WORLD

    def least(self, values: list[int]) -> list[int]:
        numbers = torch.tensor(values, dtype=torch.int64)
        self._reduce(numbers, dist.ReduceOp.MIN, dist.group.WORLD)
        return [int(n) for n in numbers.tolist()]

    def agree(self, outcome: Outcome, present: list[bool]) -> tuple[Outcome, list[bool]]:
        numbers = torch.tensor([int(outcome), *map(int, present)], dtype=torch.int32)
        self._reduce(numbers, dist.ReduceOp.MAX, dist.group.WORLD)
        gravest, *anywhere = numbers.tolist()
        return Outcome(int(gravest)), [bool(n) for n in anywhere]

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        for bucket in _buckets(tensors):
            flat = torch.cat([t.flatten() for t in bucket])
            self._reduce(flat, dist.ReduceOp.SUM, self._gradients)
            for tensor, part in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def close(self) -> None:
        dist.destroy_process_group()

    def _reduce(self, numbers: torch.Tensor, how: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> None:
        try:
            dist.all_reduce(numbers, how, group=group)
        except RuntimeError as error:
            raise lost(self.folder, error) from error


def lost(folder: Path, error: Exception) -> CbtmError:
    """What to raise when another process is gone: what it said of its own end, if it did."""
    for path in sorted(folder.glob("error-*")):
        kind, _, text = path.read_text("utf-8").partition("\n")
        return OutOfDeviceMemory(text) if kind == OutOfDeviceMemory.__name__ else InternalError(text)
    return InternalError(f"a process that trains this task on another device has ended: {error}")


@contextmanager
def together(job: TrainJob, peers: Sequence[str]) -> Iterator[Group]:
    """The group that trains `job` on its own device and on those in `peers`, whose processes live within the context.

    Raises InternalError, or OutOfDeviceMemory, when one cannot be started.
    """
    if not peers:
        yield Group()
        return
    size, threads = 1 + len(peers), torch.get_num_threads()
    # Where each process computes on the CPU, they share its cores.
    share = max(1, threads // size)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="cbtm-group-") as name:
        folder = Path(name)
        processes = [
            context.Process(
                target=_peer, args=(replace(job, device=device), rank, size, folder, share), name=device, daemon=True
            )
            for rank, device in enumerate(peers, start=1)
        ]
        torch.set_num_threads(share)
        try:
            for process in processes:
                process.start()
            group = _met(processes, size, folder, cuda=job.device.startswith("cuda"))
            try:
                yield group
            finally:
                group.close()
        finally:
            torch.set_num_threads(threads)
            _end(processes)


def _met(processes: Sequence[BaseProcess], size: int, folder: Path, *, cuda: bool) -> ProcessGroup:
    """The first process's group, once all peers are there to meet it."""
    waited = 0.0
    for rank, process in enumerate(processes, start=1):
        while not (folder / f"here-{rank}").exists():
            process.join(_POLL.total_seconds())
            waited += _POLL.total_seconds()
            if not process.is_alive() or waited > _START_SECONDS:
                raise lost(folder, InternalError(f"{process.name}: its process did not start"))
    return ProcessGroup(rank=0, size=size, folder=folder, cuda=cuda)


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.pid is None:
            continue
        process.join(_END_SECONDS)
        if process.is_alive():
            _log.warning("the process of %s does not end, and is killed", process.name)
            process.kill()
            process.join()


def _peer(job: TrainJob, rank: int, size: int, folder: Path, threads: int) -> None:
    """A peer's process: as many steps as the first one makes."""
    from cbtm_worker.train.trainer import Trainer

    for number in ending_signals():
        # The worker decides; a peer ends with it.
        signal.signal(number, signal.SIG_IGN)
    # The worker's own process says the same.
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    (folder / f"here-{rank}").touch()
    try:
        group = ProcessGroup(rank=rank, size=size, folder=folder, cuda=job.device.startswith("cuda"))
        with Trainer(job, group=group) as trainer:
            while trainer.step < trainer.total_steps:
                trainer.train_step()
        group.close()
    except GroupStopped:
        return
    except Exception as error:  # noqa: BLE001  # told to the worker's process, which has the volunteer's ear
        said = error.message if isinstance(error, CbtmError) else f"{type(error).__name__}: {error}"
        partial = folder / f".error-{rank}"
        try:
            partial.write_text(f"{type(error).__name__}\n{job.device}: {said}", "utf-8")
            partial.rename(folder / f"error-{rank}")
        except FileNotFoundError:
            # The worker's process has gone before.
            return


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
