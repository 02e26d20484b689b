"""One leased check, from its files to its report: scoring a submitted model, or replaying a segment."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import Cancelled, IntegrityError, InvalidArgument
from cbtm_common.files import FileSpec, describe, strip_prefix
from cbtm_common.recipe import Recipe
from cbtm_worker.display import TaskView
from cbtm_worker.heartbeat import Heartbeat
from cbtm_worker.inputs import Inputs, check_model
from cbtm_worker.session import Held
from cbtm_worker.task import Outcome, TaskContext, describe_task
from cbtm_worker.waiting import AnyOf

if TYPE_CHECKING:
    from cbtm_worker.train import TrainJob

_PHASE = "check"


class CheckRunner:
    """Does one EVALUATE or AUDIT task under one lease; raises what ended it early, as `TaskRunner` does."""

    def __init__(self, context: TaskContext, held: Held, spec: ws.TaskSpec, heartbeat: Heartbeat) -> None:
        self._context = context
        self._held = held
        self._spec = spec
        self._check = spec.check
        self._heartbeat = heartbeat
        recipe = Recipe.from_json(spec.run.recipe_json)
        self._recipe = recipe.of_task(seed=spec.check.subject.kind == pb.TASK_KIND_SEED)
        self._folder = context.tasks_dir / spec.task.id
        self._view = TaskView(
            run=spec.run.name, what=describe_task(spec.task), total_steps=spec.task.total_steps, phase="download"
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
        """Raises LeaseLost, Unfit, OutOfDeviceMemory, ResourceExhausted, and whatever makes the check fail."""
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            done = self._evaluate() if self._spec.task.kind == pb.TASK_KIND_EVALUATE else self._audit()
        except Cancelled:
            done = False
        finally:
            self._inputs.release()
            shutil.rmtree(self._folder, ignore_errors=True)
        self._heartbeat.check()
        return Outcome.FINISHED if done else Outcome.STOPPED

    # Scoring

    def _evaluate(self) -> bool:
        check = self._check
        sets = {"own": check.own_shards, "train": check.train_shards, "canary": check.canary_shards}
        files = {name: [FileSpec.from_proto(shard.file) for shard in shards] for name, shards in sets.items()}
        paths = self._inputs.fetch_files([file for found in files.values() for file in found])
        base = self._model([FileSpec.from_proto(f) for f in self._spec.base_model_files], "base")
        submitted = self._model([FileSpec.from_proto(f) for f in check.model_files], "submitted")
        from cbtm_worker.train.scoring import draw_windows

        windows = {
            name: draw_windows(
                [paths[file.path] for file in found],
                count=check.sequences,
                sequence_length=self._recipe.sequence_length,
                key=f"{check.sample_key}/{name}",
            )
            for name, found in files.items()
            if found
        }
        self._view.total_steps = 2 * sum(map(len, windows.values()))
        everything = [window for found in windows.values() for window in found]
        before = self._score(base, everything)
        after = self._score(submitted, everything) if before is not None else None
        if before is None or after is None:
            return False
        scores, start = {}, 0
        for name, found in windows.items():
            part = slice(start, start + len(found))
            scores[name] = _score_of(before[part], after[part])
            start += len(found)
        self._context.session.report_check(self._held, evaluation=ws.EvaluationReport(**scores))
        return True

    def _model(self, files: list[FileSpec], name: str) -> Path:
        directory = self._inputs.fetch_model(files, self._folder / name)
        check_model(directory)
        return directory

    def _score(self, model_dir: Path, windows: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.float64] | None:
        """None when told to stop."""
        from cbtm_worker.train.scoring import score

        self._advance(self._view.step)
        try:
            return score(
                model_dir,
                windows,
                device=self._context.devices[0],
                precision=self._recipe.precision,
                after=self._scored,
            )
        except Cancelled:
            return None
        except (IntegrityError, InvalidArgument) as error:
            if model_dir.name != "submitted":
                raise
            # A model that nobody can load or that does not know its own tokens is worth nothing to anybody.
            self._context.display.say(f"the submitted model cannot be scored: {error.message}")
            return np.full(len(windows), np.inf)

    def _scored(self, count: int) -> None:
        self._advance(self._view.step + count)
        if self._stops:
            raise Cancelled("the check was broken off")

    # Replaying

    def _audit(self) -> bool:
        from cbtm_worker.train.replay import deviation, replay, sampled

        check = self._check
        files = self._inputs.fetch(self._spec, self._folder, None)
        written = self._folder / "replayed"
        job = self._job(files.shard_paths, files.model_dir, files.resume_dir)
        took = replay(
            job,
            end_step=check.end_step,
            directory=written,
            threads=check.computation.threads,
            before_step=self._before_step,
        )
        if took is None:
            return False
        report = ws.AuditReport(
            files=[f.to_proto() for f in describe(written) if f.path.endswith(".safetensors")],
            computation=ws.Computation(**asdict(took)),
            sampled=sampled(written / "model"),
        )
        answer = self._context.session.report_check(self._held, audit=report)
        if answer.HasField("compare_with"):
            theirs = strip_prefix([FileSpec.from_proto(f) for f in answer.compare_with.files], "model")
            base = files.model_dir if files.resume_dir is None else files.resume_dir / "model"
            report.deviation = deviation(written / "model", self._model(theirs, "theirs"), base)
            self._context.session.report_check(self._held, audit=report)
        return True

    def _job(self, shard_paths: list[Path], model_dir: Path, resume_dir: Path | None) -> TrainJob:
        from cbtm_worker.train import TrainJob

        subject = self._check.subject
        seed = subject.kind == pb.TASK_KIND_SEED
        return TrainJob(
            recipe=self._recipe,
            task_id=subject.id,
            kind="seed" if seed else "expert",
            total_steps=subject.total_steps,
            model_dir=model_dir,
            shard_paths=shard_paths,
            data_key=self._spec.run.id if seed else subject.cluster_id,
            resume_dir=resume_dir,
            device=self._context.devices[0],
            # Dropout is drawn for each micro-batch.
            micro_batch=self._check.computation.micro_batch or None,
        )

    def _before_step(self, step: int) -> bool:
        self._heartbeat.check()
        self._advance(step - (self._check.end_step - self._spec.task.total_steps))
        return not self._stops

    # Telling

    @property
    def _stops(self) -> bool:
        return self._context.stop.is_set() or self._heartbeat.stop.is_set() or self._heartbeat.ended.is_set()

    def _advance(self, done: int) -> None:
        self._view.step = done
        self._view.phase = _PHASE
        self._heartbeat.update(phase=_PHASE, step=done)
        self._show()

    def _fetched(self, count: int) -> None:
        self._heartbeat.moved(count)
        self._view.fetched_bytes += count
        self._show()

    def _show(self) -> None:
        self._view.lease_seconds = self._heartbeat.seconds_left
        self._view.silent_seconds = self._heartbeat.silent_seconds if self._heartbeat.is_cut_off else None
        self._context.display.show(self._view)


def _score_of(before: npt.NDArray[np.float64], after: npt.NDArray[np.float64]) -> ws.Score:
    """Of one set: losses of each sequence [N], of the base model and of the submitted one."""
    with np.errstate(invalid="ignore"):
        gain = before - after
        return ws.Score(
            sequences=len(after),
            base_loss=float(before.mean()),
            loss=float(after.mean()),
            loss_deviation=float(after.std()),
            gain_deviation=float(gain.std()),
        )
