"""Training: pure compute. No network, no coordinator, no lease.

    with Trainer(TrainJob(recipe=…, task_id=…, kind="expert", total_steps=…, model_dir=…, shard_paths=…,
                          data_key=…, resume_dir=None, device="cuda:0")) as trainer:
        while trainer.step < trainer.total_steps:
            result = trainer.train_step()                        # StepResult(step, loss, tokens, seconds, …)
            if time_for_a_checkpoint:
                snapshot = trainer.snapshot()                    # quick; training may go on
                write_checkpoint(snapshot, directory, final=False)   # any thread; the directory appears whole
        write_checkpoint(trainer.snapshot(), directory, final=True)

Several devices of one machine train it as one does (`with together(job, ["cuda:1"]) as group, Trainer(job, group=group)
as trainer`): the same batches, the same steps up to rounding, one snapshot. A model that does not fit one of them is
shared (`TrainJob.shard`); then `train_step` may raise `StartAgain`, which says how to go on from a checkpoint.

Guarantees: the weights after step n are a function of (recipe, kind, total_steps, starting weights, shards in order,
data_key, n). Resumed from any checkpoint on the same kind of device with the same micro-batch, threads, number of
devices, and way of holding the model (each all of it, or a share), weights and optimizer state are bit-identical to an
undisturbed run's. Any micro-batch, number of devices and way of holding the model gives the same gradient up to
rounding (and any micro-batch up to the draw of dropout).

Errors: `InvalidArgument` for a job that cannot be (a sequence longer than the model's context, token ids outside its
vocabulary, shards under one sequence), `IntegrityError` for files that are not what they should be, `InvalidState`
for a checkpoint of another job, `OutOfDeviceMemory` when the least placement does not fit, `Diverged` when the loss
is no longer a number (raised by `train_step`, at most one step late on CUDA, and by `snapshot`).

Fault points passed here: `worker.step.after` at the end of each step, `worker.checkpoint.before_write` and
`worker.checkpoint.after_write` in `write_checkpoint`.

Names are imported on first use, so that importing this package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cbtm_worker.train.checkpoint import (
        CheckpointState,
        Snapshot,
        read_state,
        remove_partial,
        write_checkpoint,
    )
    from cbtm_worker.train.errors import Diverged, OutOfDeviceMemory, StartAgain
    from cbtm_worker.train.group import Group
    from cbtm_worker.train.job import Shard, StepResult, TaskKind, TrainJob
    from cbtm_worker.train.peers import together
    from cbtm_worker.train.trainer import Trainer

_HOME = {
    "CheckpointState": "checkpoint",
    "Diverged": "errors",
    "Group": "group",
    "OutOfDeviceMemory": "errors",
    "Shard": "job",
    "Snapshot": "checkpoint",
    "StartAgain": "errors",
    "StepResult": "job",
    "TaskKind": "job",
    "TrainJob": "job",
    "Trainer": "trainer",
    "read_state": "checkpoint",
    "remove_partial": "checkpoint",
    "together": "peers",
    "write_checkpoint": "checkpoint",
}

__all__ = [
    "CheckpointState",
    "Diverged",
    "Group",
    "OutOfDeviceMemory",
    "Shard",
    "Snapshot",
    "StartAgain",
    "StepResult",
    "TaskKind",
    "TrainJob",
    "Trainer",
    "read_state",
    "remove_partial",
    "together",
    "write_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
