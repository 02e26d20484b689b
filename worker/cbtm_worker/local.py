"""The checkpoints of one task on this disk.

    TASKS/<task id>/s<step>/        a checkpoint, whole (it was renamed into place)
    TASKS/<task id>/s<step>.done    it is committed: the coordinator has it
    TASKS/<task id>/.*.partial      being written or removed; left by a crash, it is swept away

The folder is the queue of uploads: what is there without `.done` is still to be sent, also after a crash.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from cbtm_common.errors import IntegrityError
from cbtm_common.faults import point

# A checkpoint of another task that was not handed in is kept so long, should that task come back.
_KEEP_SECONDS = 86_400.0


@dataclass(frozen=True, kw_only=True)
class LocalCheckpoint:
    step: int
    directory: Path
    committed: bool


class LocalCheckpoints:
    """What is kept of one task. Its methods may be called from several threads, but not `sweep`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        return self.folder / f"s{step:010d}"

    def all(self) -> list[LocalCheckpoint]:
        """Whole ones, the newest first."""
        found = [
            LocalCheckpoint(step=int(path.name[1:]), directory=path, committed=_done(path).exists())
            for path in self.folder.glob("s*")
            if path.is_dir() and path.name[1:].isdigit()
        ]
        return sorted(found, key=lambda c: -c.step)

    def newest(self, task_id: str) -> LocalCheckpoint | None:
        """The newest whose own state says that it is of this task and step; others are removed."""
        from cbtm_worker.train import read_state

        for checkpoint in self.all():
            try:
                state = read_state(checkpoint.directory)
            except IntegrityError:
                self._remove(checkpoint.directory)
                continue
            if (state.task_id, state.step) == (task_id, checkpoint.step):
                return checkpoint
            self._remove(checkpoint.directory)
        return None

    @property
    def committed_step(self) -> int:
        """Of the newest that the coordinator has, or 0."""
        return max((c.step for c in self.all() if c.committed), default=0)

    def mark_committed(self, step: int) -> None:
        _done(self.path(step)).touch()

    def prune(self, keep: Collection[int]) -> None:
        """Removes all but the newest committed one, those in `keep`, and those newer than all of them."""
        kept = {self.committed_step, *keep}
        for checkpoint in self.all():
            if checkpoint.step not in kept and checkpoint.step < max(kept):
                self._remove(checkpoint.directory)

    def sweep(self) -> None:
        """Removes what writes and removals that were cut off left. Only before anybody writes here."""
        for path in self.folder.glob(".*.partial"):
            shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Removes everything of the task."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _remove(self, directory: Path) -> None:
        """Renamed first, so that half a checkpoint is never taken for a whole one."""
        doomed = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.partial")
        point("worker.prune.before_rename")
        _done(directory).unlink(missing_ok=True)
        # Two threads may have found it needless.
        with contextlib.suppress(FileNotFoundError):
            directory.rename(doomed)
        point("worker.prune.after_rename")
        shutil.rmtree(doomed, ignore_errors=True)


def drop_other_tasks(tasks_dir: Path, *, keep: str, now: float, all_of_them: bool = False) -> None:
    """Removes what is left of tasks other than `keep`: what the coordinator has, at once; the rest after a day.

    `now` is in seconds since the epoch, as files' times are. With `all_of_them`, when room is needed, nothing stays.
    """
    for folder in tasks_dir.glob("*"):
        if folder.name == keep or not folder.is_dir():
            continue
        unsent = [c for c in LocalCheckpoints(folder).all()[:1] if not c.committed]
        if all_of_them or not unsent or now - unsent[0].directory.stat().st_mtime > _KEEP_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _done(directory: Path) -> Path:
    return directory.with_name(directory.name + ".done")
