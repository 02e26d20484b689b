"""The processes that train one task on devices of one machine: started, met, ended.

The first is the worker's own; the others (peers) know nothing of leases or checkpoints, do what it does, and end with
it. What one says of its end reaches the worker's (`last_words`).
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from cbtm_common.errors import InternalError
from cbtm_common.signals import ending_signals
from cbtm_worker.train.group import Group, GroupStopped, ProcessGroup
from cbtm_worker.train.job import TrainJob
from cbtm_worker.train.last_words import leave_word, lost
from cbtm_worker.train.lifeline import end_with_parent, when_one_dies

_log = logging.getLogger(__name__)
# For a peer to import torch.
_START_SECONDS = 300.0
_POLL = timedelta(seconds=0.2)
_END_SECONDS = 30.0


@contextmanager
def together(job: TrainJob, peers: Sequence[str]) -> Iterator[Group]:
    """The group that trains `job` on its own device and on those in `peers`, whose processes live within the context.

    Raises InternalError, or OutOfDeviceMemory, when one cannot be started.
    """
    if not peers:
        yield Group()
        return
    size, threads, patience = 1 + len(peers), torch.get_num_threads(), _END_SECONDS
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
                with when_one_dies(processes, group.abort):
                    yield group
            finally:
                patience = 0.0 if group.is_aborted else _END_SECONDS
                group.close()
        finally:
            torch.set_num_threads(threads)
            _end(processes, patience)


def _met(processes: Sequence[BaseProcess], size: int, folder: Path, *, cuda: bool) -> ProcessGroup:
    """The first process's group, once all peers are there to meet it."""
    waited = 0.0
    for rank, process in enumerate(processes, start=1):
        while not (folder / f"here-{rank}").exists():
            process.join(_POLL.total_seconds())
            waited += _POLL.total_seconds()
            if not process.is_alive() or waited > _START_SECONDS:
                raise lost(folder, InternalError(f"{process.name}: its process did not start"))
    return ProcessGroup(rank=0, size=size, folder=folder, cuda=cuda, others=processes)


def _end(processes: Sequence[BaseProcess], patience: float) -> None:
    for process in processes:
        if process.pid is None:
            continue
        process.join(patience)
        if process.is_alive():
            if patience:
                _log.warning("the process of %s does not end, and is killed", process.name)
            process.kill()
            process.join()


def _peer(job: TrainJob, rank: int, size: int, folder: Path, threads: int) -> None:
    """A peer's process: what the first one does, until that ends."""
    from cbtm_worker.train.trainer import Trainer

    for number in ending_signals():
        # The worker decides; a peer ends with it.
        signal.signal(number, signal.SIG_IGN)
    # The worker's own process says the same.
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    end_with_parent()
    (folder / f"here-{rank}").touch()
    try:
        group = ProcessGroup(rank=rank, size=size, folder=folder, cuda=job.device.startswith("cuda"))
        with Trainer(job, group=group) as trainer:
            trainer.follow()
        group.close()
    except GroupStopped:
        return
    except Exception as error:  # noqa: BLE001  # told to the worker's process, which has the volunteer's ear
        leave_word(folder, rank, job.device, error)
        sys.exit(1)
