"""One leased task, from its files to its last checkpoint."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.cache import ContentCache
from cbtm_common.errors import RETRYABLE, IntegrityError
from cbtm_common.faults import point
from cbtm_common.files import FileSpec
from cbtm_common.protos import JsonValue, from_duration
from cbtm_common.recipe import Recipe
from cbtm_common.rpc import RetryPolicy
from cbtm_common.transfer import Transfer
from cbtm_worker.config import WorkerConfig
from cbtm_worker.display import Display, TaskView
from cbtm_worker.heartbeat import Heartbeat
from cbtm_worker.session import Held, Session
from cbtm_worker.uploader import Uploader, local_checkpoints

if TYPE_CHECKING:
    from cbtm_worker.train import Trainer, TrainJob

_T = TypeVar("_T")
_log = logging.getLogger(__name__)
_RETRY = RetryPolicy(initial=1.0, maximum=30.0)


class Outcome(StrEnum):
    # The final checkpoint is committed.
    FINISHED = "finished"
    # Saved and given back before its end: by the volunteer, or because the coordinator asked.
    STOPPED = "stopped"


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """What a task needs of its worker. `tasks_dir` holds local checkpoints by task."""

    session: Session
    config: WorkerConfig
    device: str
    cache: ContentCache
    transfer: Transfer
    tasks_dir: Path
    display: Display
    stop: threading.Event


class TaskRunner:
    """Trains one task under one lease. `run` raises what ended it early; the caller releases the lease."""

    def __init__(self, context: TaskContext, held: Held, spec: ws.TaskSpec, heartbeat: Heartbeat) -> None:
        self._context = context
        self._held = held
        self._spec = spec
        self._heartbeat = heartbeat
        self._recipe = Recipe.from_json(spec.run.recipe_json)
        self._folder = context.tasks_dir / spec.task.id
        self._used: list[FileSpec] = []
        self._interval = from_duration(spec.policy.checkpoint_interval).total_seconds()
        seed = spec.task.kind == pb.TASK_KIND_SEED
        what = "seed" if seed else f"cluster {spec.task.cluster_index}"
        self._view = TaskView(
            run=spec.run.name,
            what=what,
            total_steps=spec.task.total_steps,
            step=spec.task.committed_step,
            saved_step=spec.task.committed_step,
            phase="download",
        )

    def run(self) -> Outcome:
        """Raises LeaseLost, OutOfDeviceMemory, ResourceExhausted, and whatever makes training fail."""
        committed = int(self._spec.task.committed_step)
        uploader = Uploader(self._context.session, self._held, self._heartbeat, self._context.transfer, self._folder)
        try:
            newest = next(iter(local_checkpoints(self._folder)), None)
            if newest is not None and newest.step == self._spec.task.total_steps and newest.step > committed:
                # Trained to the end before a crash: only the upload is left.
                uploader.resume(newest, final=True)
                uploader.flush()
                return Outcome.FINISHED
            job = self._prepare(uploader, committed)
            point("worker.download.after")
            from cbtm_worker.train import Trainer

            with Trainer(job) as trainer:
                return self._train(trainer, uploader)
        finally:
            uploader.close()
            self._context.cache.release(self._used)

    # Files

    def _prepare(self, uploader: Uploader, committed: int) -> TrainJob:
        """Everything on this disk that training needs, and where to go on from."""
        from cbtm_worker.train import TrainJob

        shards = self._retried(lambda: self._context.session.shards(self._held))
        paths = self._fetch(shards)
        resume = self._local_resume(uploader, committed)
        if resume is None and self._spec.HasField("resume_from"):
            resume = self._fetch_folder(
                [FileSpec.from_proto(f) for f in self._spec.resume_from.files], self._folder / "from"
            )
        model = self._folder / "base"
        if resume is None:
            self._fetch_folder([FileSpec.from_proto(f) for f in self._spec.base_model_files], model)
        task = self._spec.task
        seed = task.kind == pb.TASK_KIND_SEED
        config = self._context.config
        return TrainJob(
            recipe=self._recipe,
            task_id=task.id,
            kind="seed" if seed else "expert",
            total_steps=task.total_steps,
            model_dir=model,
            shard_paths=[paths[shard.path] for shard in shards],
            data_key=self._spec.run.id if seed else task.cluster_id,
            resume_dir=resume,
            device=self._context.device,
            micro_batch=config.micro_batch,
            compile=config.compile,
        )

    def _local_resume(self, uploader: Uploader, committed: int) -> Path | None:
        """A checkpoint of this task on this disk that is at least as far as the coordinator's.

        Training is a function of the step, so it is the same checkpoint, or one further on, that any worker would make.
        One that the coordinator does not have yet is sent first.
        """
        from cbtm_worker.train import read_state

        for checkpoint in local_checkpoints(self._folder):
            if checkpoint.step < committed:
                return None
            try:
                state = read_state(checkpoint.directory)
            except IntegrityError as error:
                _log.warning("a local checkpoint is left out: %s", error.message)
                continue
            if state.task_id != self._spec.task.id or state.step != checkpoint.step:
                continue
            if checkpoint.step > committed:
                uploader.resume(checkpoint, final=False)
            return checkpoint.directory
        return None

    def _fetch(self, files: list[FileSpec]) -> dict[str, Path]:
        """Verified local files, by path; a coordinator or store that is away is waited for."""
        self._used += files
        return self._retried(
            lambda: self._context.cache.fetch_all(
                files,
                self._downloads,
                self._context.transfer,
                on_bytes=self._moved,
                cancelled=self._heartbeat.ended,
            )
        )

    def _downloads(self, keys: list[str]) -> Sequence[pb.Download]:
        return self._context.session.downloads(self._held, keys)

    def _fetch_folder(self, files: list[FileSpec], folder: Path) -> Path:
        for file in files:
            # Weights and configs are all that is read; nothing that could be code is even stored.
            if not file.path.endswith((".safetensors", ".json", ".txt", ".model")):
                raise IntegrityError(f"{file.path}: is not a file of a model or checkpoint")
        self._used += files
        return self._retried(
            lambda: self._context.cache.materialize(
                files,
                folder,
                self._downloads,
                self._context.transfer,
                on_bytes=self._moved,
                cancelled=self._heartbeat.ended,
            )
        )

    def _retried(self, action: Callable[[], _T]) -> _T:
        attempt = 0
        while True:
            self._heartbeat.check()
            try:
                return action()
            except RETRYABLE as error:
                self._context.display.say(f"waiting: {error.message}")
                self._heartbeat.ended.wait(_RETRY.delay(min(attempt, 10), random.random()))
                attempt += 1

    def _moved(self, count: int) -> None:
        self._heartbeat.moved(count)
        self._view.moved_bytes += count
        self._view.lease_seconds = self._heartbeat.seconds_left
        self._context.display.show(self._view)

    # Training

    def _train(self, trainer: Trainer, uploader: Uploader) -> Outcome:
        speed = _Speed(trainer.step)
        self._view.step = trainer.step
        saved_at = time.monotonic()
        started = time.monotonic()
        while trainer.step < trainer.total_steps:
            self._heartbeat.check()
            uploader.check()
            if self._context.stop.is_set() or self._heartbeat.stop.is_set():
                return self._leave(trainer, uploader)
            result = trainer.train_step()
            speed.add(result.step, result.tokens)
            if speed.due or result.step == trainer.total_steps:
                self._note(result.step, result.loss, speed.tokens_per_second, uploader)
            asked = self._heartbeat.take_checkpoint_request()
            due = time.monotonic() - saved_at >= self._interval and not uploader.busy
            if (asked or due) and trainer.step < trainer.total_steps:
                metrics = self._metrics(result.loss, speed.tokens_per_second, started)
                uploader.submit(trainer.snapshot(), step=trainer.step, final=False, metrics=metrics)
                saved_at = time.monotonic()
        self._heartbeat.update(phase="upload")
        self._view.phase = "upload"
        loss = self._view.loss or 0.0
        metrics = self._metrics(loss, speed.tokens_per_second, started)
        uploader.submit(trainer.snapshot(final=True), step=trainer.step, final=True, metrics=metrics)
        uploader.flush()
        return Outcome.FINISHED

    def _leave(self, trainer: Trainer, uploader: Uploader) -> Outcome:
        """Saves where training stands, and stops. Costs nothing: what was done is kept."""
        why = "as asked" if self._context.stop.is_set() else f"the coordinator asked: {self._heartbeat.stop_reason}"
        self._context.display.say(f"stopping ({why}): saving step {trainer.step:,} of {self._view.what}")
        self._heartbeat.update(phase="upload")
        if trainer.step > max(uploader.committed_step, int(self._spec.task.committed_step)):
            uploader.submit(trainer.snapshot(), step=trainer.step, final=False, metrics={"loss": self._view.loss})
        uploader.flush()
        return Outcome.STOPPED

    def _note(self, step: int, loss: float, tokens_per_second: float, uploader: Uploader) -> None:
        self._heartbeat.update(phase="train", step=step, loss=loss, tokens_per_second=tokens_per_second)
        view = self._view
        view.phase = "upload" if uploader.busy else "train"
        view.step, view.loss, view.tokens_per_second = step, loss, tokens_per_second
        view.saved_step = max(uploader.committed_step, int(self._spec.task.committed_step))
        view.lease_seconds = self._heartbeat.seconds_left
        tokens = (view.total_steps - step) * self._recipe.global_batch * self._recipe.sequence_length
        view.seconds_left = tokens / tokens_per_second if tokens_per_second else None
        self._context.display.show(view)

    def _metrics(self, loss: float, tokens_per_second: float, started: float) -> dict[str, JsonValue]:
        return {
            "loss": loss,
            "tokens_per_second": tokens_per_second,
            "train_seconds": time.monotonic() - started,
            "device": self._context.device,
        }


class _Speed:
    """Tokens a second over the last seconds, and when it is time to tell."""

    _WINDOW = 10.0
    _TELL = 0.25

    def __init__(self, step: int) -> None:
        self._marks: list[tuple[float, int]] = [(time.monotonic(), 0)]
        self._tokens = 0
        self._told = 0.0
        self.step = step

    def add(self, step: int, tokens: int) -> None:
        now = time.monotonic()
        self.step = step
        self._tokens += tokens
        self._marks.append((now, self._tokens))
        while len(self._marks) > 2 and now - self._marks[1][0] > self._WINDOW:
            self._marks.pop(0)

    @property
    def due(self) -> bool:
        now = time.monotonic()
        if now - self._told < self._TELL:
            return False
        self._told = now
        return True

    @property
    def tokens_per_second(self) -> float:
        (since, before), (now, tokens) = self._marks[0], self._marks[-1]
        return (tokens - before) / (now - since) if now > since else 0.0
