"""One leased task, from its files to its last checkpoint."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.cache import ContentCache
from cbtm_common.errors import Cancelled, CbtmError, InvalidArgument, LeaseLost, ResourceExhausted
from cbtm_common.faults import point
from cbtm_common.protos import JsonValue
from cbtm_common.recipe import Recipe
from cbtm_common.transfer import Transfer
from cbtm_worker.config import WorkerConfig
from cbtm_worker.display import Display, TaskView
from cbtm_worker.heartbeat import Heartbeat
from cbtm_worker.inputs import Inputs, Unfit
from cbtm_worker.local import LocalCheckpoint, LocalCheckpoints, drop_other_tasks
from cbtm_worker.session import Held, Session
from cbtm_worker.speed import Speed
from cbtm_worker.uploader import Uploader
from cbtm_worker.waiting import AnyOf

if TYPE_CHECKING:
    from cbtm_worker.train import StartAgain, StepResult, Trainer, TrainJob

_log = logging.getLogger(__name__)
# A loss is read from the device, and told, so often.
_NOTE_SECONDS = 0.25
# Who leaves waits no longer for an upload that comes no nearer to its end. A transfer notices a dead link sooner.
_STALL_SECONDS = 90.0


class Outcome(StrEnum):
    # The final checkpoint is committed.
    FINISHED = "finished"
    # Saved and to be given back before its end: by the volunteer, or because the coordinator asked.
    STOPPED = "stopped"
    # Saved on this disk alone: the volunteer leaves while the coordinator, or the store, is away.
    KEPT = "kept"


@dataclass(frozen=True, kw_only=True)
class TaskContext:
    """What a task needs of its worker. `tasks_dir` holds local checkpoints by task; `stop` is the volunteer's."""

    session: Session
    config: WorkerConfig
    # They train each task together.
    devices: tuple[str, ...]
    cache: ContentCache
    transfer: Transfer
    tasks_dir: Path
    display: Display
    stop: threading.Event


class TaskRunner:
    """Trains one task under one lease. `run` raises what ended it early; the caller releases the lease.

    `continued`: the lease is one that a former process of this worker held, so that `spec` may be behind the disk.
    """

    def __init__(
        self, context: TaskContext, held: Held, spec: ws.TaskSpec, heartbeat: Heartbeat, *, continued: bool = False
    ) -> None:
        self._context = context
        self._spec = spec
        self._heartbeat = heartbeat
        try:
            recipe = Recipe.from_json(spec.run.recipe_json)
        except InvalidArgument as error:
            raise Unfit(f"this cbtm does not know the run's recipe; upgrade it ({error.message})") from error
        self._recipe = recipe.of_task(seed=spec.task.kind == pb.TASK_KIND_SEED)
        drop_other_tasks(context.tasks_dir, keep=spec.task.id, now=time.time())
        self._local = LocalCheckpoints(context.tasks_dir / spec.task.id)
        if not continued and self._local.committed_step > spec.task.committed_step:
            # Its owner started the task anew: nothing of its earlier life counts.
            self._local.clear()
        self._committed = max(int(spec.task.committed_step), self._local.committed_step)
        self._view = TaskView(
            run=spec.run.name,
            what=describe_task(spec.task),
            total_steps=spec.task.total_steps,
            step=self._committed,
            saved_step=self._committed,
            phase="download",
        )
        self._uploader = Uploader(
            context.session,
            held,
            heartbeat,
            context.transfer,
            self._local.folder,
            say=context.display.say,
            make_room=lambda: drop_other_tasks(context.tasks_dir, keep=spec.task.id, now=time.time(), all_of_them=True),
        )
        self._inputs = Inputs(
            context.session,
            held,
            heartbeat,
            context.cache,
            context.transfer,
            cancelled=AnyOf(heartbeat.ended, heartbeat.stop, context.stop),
            on_bytes=self._fetched,
            say=context.display.say,
        )

    def run(self) -> Outcome:
        """Raises LeaseLost, Unfit, OutOfDeviceMemory, ResourceExhausted, and whatever makes training fail."""
        try:
            return self._run()
        except Exception:
            if self._heartbeat.lost is None:
                # What was saved before training failed is as good as ever. What ended it is told, not this.
                with contextlib.suppress(Exception):
                    self._uploader.flush(tick=self._show, give_up=self._gives_up)
            raise
        finally:
            self._uploader.close(abandon=True)
            self._inputs.release()

    def _run(self) -> Outcome:
        newest = self._local.newest(self._spec.task.id)
        if newest is not None and newest.step < self._committed:
            newest = None
        if newest is not None and not newest.committed and newest.step > self._spec.task.committed_step:
            self._uploader.resume(newest, _metrics_of(newest))
        if newest is not None and newest.step == self._spec.task.total_steps:
            # Trained to the end before a crash: only the upload is left.
            return self._flushed(Outcome.FINISHED)
        point("worker.download.before")
        try:
            job = self._job(newest)
        except Cancelled:
            self._heartbeat.check()
            return self._flushed(Outcome.STOPPED)
        point("worker.download.after")
        from cbtm_worker.train import StartAgain

        peers = self._peers()
        while True:
            try:
                return self._trained(job, peers)
            except StartAgain as again:
                job = self._changed(job, again)

    def _trained(self, job: TrainJob, peers: tuple[str, ...]) -> Outcome:
        from cbtm_worker.train import Trainer, together

        with together(job, peers) as group, Trainer(job, group=group) as trainer:
            try:
                return self._train(trainer)
            except LeaseLost as error:
                self._keep(trainer, error)
                raise

    def _changed(self, job: TrainJob, again: StartAgain) -> TrainJob:
        """What to go on with: from the newest checkpoint, once the last is on this disk."""
        while self._uploader.is_writing:
            self._heartbeat.check()
            self._uploader.check()
            self._show()
            time.sleep(_NOTE_SECONDS)
        newest = self._local.newest(self._spec.task.id)
        step = self._committed
        if newest is not None and newest.step >= step:
            job, step = replace(job, resume_dir=newest.directory), newest.step
        said = ", ".join(f"{name}={value}" for name, value in again.changes.items())
        self._context.display.say(f"{again.message}: going on from step {step:,} with {said}")
        changes: dict[str, Any] = dict(again.changes)
        return replace(job, **changes)

    def _job(self, newest: LocalCheckpoint | None) -> TrainJob:
        """Training is a function of the step, so a checkpoint on this disk is as good as the coordinator's."""
        from cbtm_worker.train import TrainJob

        files = self._inputs.fetch(self._spec, self._local.folder, newest.directory if newest else None)
        task, config = self._spec.task, self._context.config
        seed = task.kind == pb.TASK_KIND_SEED
        return TrainJob(
            recipe=self._recipe,
            task_id=task.id,
            kind="seed" if seed else "expert",
            total_steps=task.total_steps,
            model_dir=files.model_dir,
            shard_paths=files.shard_paths,
            data_key=self._spec.run.id if seed else task.cluster_id,
            resume_dir=files.resume_dir,
            device=self._context.devices[0],
            micro_batch=config.micro_batch,
            placement_cache=config.cache_dir / "micro-batches.json",
            compile=config.compile,
            shard=config.shard,
        )

    def _peers(self) -> tuple[str, ...]:
        """The devices beside the first: as many as the global batch can be dealt to evenly."""
        from cbtm_worker.train.memory import largest_divisor

        devices, batch = self._context.devices, self._recipe.global_batch
        used = largest_divisor(batch, len(devices))
        if used < len(devices):
            self._context.display.say(
                f"training on {used} of {len(devices)} devices, for the global batch is {batch} sequences;"
                " with --per-gpu each has a task of its own"
            )
        return devices[1:used]

    # Training

    def _train(self, trainer: Trainer) -> Outcome:
        speed = Speed()
        started = saved = time.monotonic()
        noted = 0.0
        asked = False
        self._view.step = trainer.step
        self._view.phase = "train"
        self._heartbeat.update(phase="train")
        while trainer.step < trainer.total_steps:
            self._heartbeat.check()
            self._uploader.check()
            if self._context.stop.is_set() or self._heartbeat.stop.is_set():
                return self._leave(trainer, self._metrics(trainer, speed, started))
            result = trainer.train_step()
            speed.add(result.tokens)
            now = time.monotonic()
            if now - noted >= _NOTE_SECONDS or result.step == trainer.total_steps:
                noted = now
                self._note(result, speed)
            asked |= self._heartbeat.take_checkpoint_request()
            due = asked or now - saved >= self._heartbeat.checkpoint_seconds
            # One that is still being written is worth more than the next.
            if due and result.step < trainer.total_steps and not self._uploader.is_writing:
                metrics = {**self._metrics(trainer, speed, started), "loss": result.loss}
                self._uploader.submit(trainer.snapshot(), step=trainer.step, final=False, metrics=metrics)
                asked, saved = False, time.monotonic()
        self._heartbeat.update(phase="upload")
        self._view.phase = "upload"
        metrics = self._metrics(trainer, speed, started)
        self._uploader.submit(trainer.snapshot(final=True), step=trainer.step, final=True, metrics=metrics, last=True)
        return self._flushed(Outcome.FINISHED)

    def _leave(self, trainer: Trainer, metrics: dict[str, JsonValue]) -> Outcome:
        """Saves where training stands, and stops. Costs nothing: what was done is kept."""
        why = "as asked" if self._context.stop.is_set() else f"the coordinator asked: {self._heartbeat.stop_reason}"
        self._context.display.say(f"stopping ({why}): saving step {trainer.step:,} of {self._view.what}")
        self._heartbeat.update(phase="upload")
        self._view.phase = "upload"
        if trainer.step > self._uploader.newest_step:
            self._uploader.submit(
                trainer.snapshot(), step=trainer.step, final=False, metrics=metrics, last=True, patient=False
            )
        else:
            self._uploader.skip_older()
        return self._flushed(Outcome.STOPPED)

    def _flushed(self, outcome: Outcome) -> Outcome:
        """`outcome` when all is handed in; KEPT when that cannot be done now and the volunteer wants to leave."""
        return outcome if self._uploader.flush(tick=self._show, give_up=self._gives_up) else Outcome.KEPT

    def _gives_up(self) -> bool:
        """Whether not to wait any longer for a coordinator or a store that is away."""
        stalled = self._heartbeat.seconds_left < 0 or self._uploader.stalled_seconds > _STALL_SECONDS
        return self._context.stop.is_set() and stalled

    def _keep(self, trainer: Trainer, error: LeaseLost) -> None:
        """After an outage that was longer than the lease: keeps the work, in case that nobody else took the task."""
        from cbtm_worker.train import write_checkpoint

        newest = next(iter(self._local.all()), None)
        if error.metadata.get("state") != "EXPIRED" or (newest is not None and newest.step >= trainer.step):
            return
        self._uploader.close(abandon=True)
        try:
            write_checkpoint(trainer.snapshot(), self._local.path(trainer.step), final=False)
        except ResourceExhausted as full:
            _log.warning("step %d is not kept: %s", trainer.step, full.message)

    # Telling

    @property
    def _saved_step(self) -> int:
        return max(self._uploader.committed_step, self._committed)

    def _fetched(self, count: int) -> None:
        self._heartbeat.moved(count)
        self._view.fetched_bytes += count
        self._show()

    def _note(self, result: StepResult, speed: Speed) -> None:
        view, rate = self._view, speed.tokens_per_second
        view.step, view.loss, view.tokens_per_second = result.step, result.loss, rate
        step_seconds = self._recipe.step_tokens() / rate if rate else 0.0
        view.seconds_left = (view.total_steps - view.step) * step_seconds if rate else None
        self._heartbeat.update(
            phase="train", step=result.step, loss=result.loss, tokens_per_second=rate, step_seconds=step_seconds
        )
        self._show()

    def _show(self) -> None:
        view, heartbeat, sending = self._view, self._heartbeat, self._uploader.sending
        view.saved_step = self._saved_step
        view.lease_seconds = heartbeat.seconds_left
        view.silent_seconds = heartbeat.silent_seconds if heartbeat.is_cut_off else None
        view.sending = (sending.step, sending.sent_bytes, sending.total_bytes) if sending else None
        self._context.display.show(view)

    def _metrics(self, trainer: Trainer, speed: Speed, started: float) -> dict[str, JsonValue]:
        return {
            "loss": self._view.loss,
            "tokens_per_second": speed.tokens_per_second,
            "train_seconds": time.monotonic() - started,
            "device": ", ".join(self._context.devices),
            # By which a replay knows what to expect.
            **asdict(trainer.computation),
        }


def describe_task(task: pb.Task) -> str:
    """A task as a volunteer reads it: "seed", "cluster 3", "evaluation of cluster 3"."""
    of = "seed" if task.kind == pb.TASK_KIND_SEED or task.cluster_index < 0 else f"cluster {task.cluster_index}"
    if task.kind == pb.TASK_KIND_EVALUATE:
        return f"evaluation of {of}"
    return f"replay of {of}" if task.kind == pb.TASK_KIND_AUDIT else of


def describe_error(error: BaseException) -> str:
    """One line about an error, for the coordinator and the volunteer."""
    return error.message if isinstance(error, CbtmError) else f"{type(error).__name__}: {error}"


def _metrics_of(checkpoint: LocalCheckpoint) -> dict[str, JsonValue]:
    from cbtm_worker.train import read_state

    return {"loss": read_state(checkpoint.directory).loss}
