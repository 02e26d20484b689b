"""A process that trains `make_job(directory)` again and again, each time in a fork that a fault may kill.

    python -m tests.support.train_child DIRECTORY FAULTS FAULTS ...

Each fork goes on from the checkpoint that the one before it left, and checkpoints after every step. Prints one JSON
list: for each plan of faults, [exit status of its fork (negative: the signal), step of the checkpoint it left]. One
process imports torch for all of them; it never computes with it, so that forking is safe.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

from cbtm_common import faults
from cbtm_worker.train import Trainer, read_state, write_checkpoint
from tests.support.training import make_job


def train(directory: Path) -> None:
    checkpoint = directory / "kept" / "checkpoint"
    job = make_job(directory)
    if checkpoint.exists():
        job = dataclasses.replace(job, resume_dir=checkpoint)
    with Trainer(job) as trainer:
        while trainer.step < trainer.total_steps:
            trainer.train_step()
            write_checkpoint(trainer.snapshot(), checkpoint, final=False)


def main(directory: Path, plans: list[str]) -> None:
    results = []
    for plan in plans:
        child = os.fork()
        if child == 0:
            faults._plan = faults.FaultPlan.parse(plan)
            train(directory)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        results.append((os.waitstatus_to_exitcode(status), read_state(directory / "kept" / "checkpoint").step))
    sys.stdout.write(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
