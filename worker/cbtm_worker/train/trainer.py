"""Trains one task, step by step.

Loss is the mean cross-entropy over all tokens of the global batch; the gradient is accumulated over micro-batches,
clipped by its global norm, and applied by AdamW at the schedule's rate. Weights, gradients and optimizer state are
float32; with `precision = "bf16"` the forward pass runs under bf16 autocast on a CUDA device that computes in bf16, and
in float32 anywhere else, CPUs included.

On CUDA every operation is asked for its deterministic form; a model with one that has none trains all the same, with
a warning. There, the host runs at most one step ahead of the device: it waits for the step before last, never for the
last, so that the device always has work queued. With a group it is one of several processes, each with a device of its
own, that train as one, as replicas or with shares of one model (`layout`). Not covered: leases, uploads.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from types import TracebackType

import torch

from cbtm_common import faults
from cbtm_common.errors import CbtmError, InternalError, InvalidArgument, InvalidState
from cbtm_common.recipe import Precision
from cbtm_worker.train.checkpoint import (
    MODEL,
    CheckpointState,
    Snapshot,
    check_resumable,
    read_state,
)
from cbtm_worker.train.computation import Computation, computes_bf16
from cbtm_worker.train.data import Batches, ShardSet
from cbtm_worker.train.device import PendingValues, device_name, open_device, seed_draws
from cbtm_worker.train.errors import Diverged, OutOfDeviceMemory, StartAgain
from cbtm_worker.train.group import Call, Group, GroupStopped, Outcome
from cbtm_worker.train.job import StepResult, TrainJob
from cbtm_worker.train.layout import choose_layout
from cbtm_worker.train.loss import Loss
from cbtm_worker.train.memory import Placement
from cbtm_worker.train.model import context_length, lacks_determinism, load_model, make_deterministic, vocabulary_size
from cbtm_worker.train.optimizer import make_optimizer, optimizer_tensors, restore_optimizer
from cbtm_worker.train.order import draw_seed
from cbtm_worker.train.placing import Placer
from cbtm_worker.train.schedule import Schedule

_log = logging.getLogger(__name__)

# Called before each micro-step with (step, index of the micro-step, sequences in it); tests raise from it.
MicroStepHook = Callable[[int, int, int], None]


class Trainer:
    """Trains `job` from its beginning or from a checkpoint. Not thread-safe; close it, or use it as a context.

    torch's global random state is overwritten at each micro-step.
    """

    def __init__(
        self, job: TrainJob, *, group: Group | None = None, before_micro_step: MicroStepHook | None = None
    ) -> None:
        recipe = job.recipe
        self._job = job
        self._group = group or Group()
        self._hook = before_micro_step
        self._device = open_device(job.device)
        self._device_name = device_name(self._device)
        self._schedule = Schedule.of(recipe, job.kind, job.total_steps)
        self._tokens = recipe.global_batch * recipe.sequence_length
        make_deterministic(self._device, strict=job.deterministic)

        resumed = None
        if job.resume_dir is not None:
            resumed = read_state(job.resume_dir)
            check_resumable(resumed, job)
        self._step = resumed.step if resumed else 0
        self._loss = resumed.loss if resumed else None
        self._pending: list[PendingValues] = []
        # Whether the group's other processes have ended, will by themselves, or, where they share a model, are in the
        # middle of a step or save and cannot be called.
        self._is_over = False

        source = job.model_dir if job.resume_dir is None else job.resume_dir / MODEL
        model, self._skeleton = load_model(source, dropout=recipe.dropout, sequence_length=recipe.sequence_length)
        limit = context_length(model.config)
        if limit is not None and recipe.sequence_length > limit:
            raise InvalidArgument(
                f"sequence_length: {recipe.sequence_length} is over the model's context of {limit} tokens",
                field="sequence_length",
            )
        shards = ShardSet(job.shard_paths, sequence_length=recipe.sequence_length, vocab_size=vocabulary_size(model))
        half = computes_bf16(self._device) and recipe.precision is Precision.BF16
        self._layout = choose_layout(job, self._group, model, self._device, half=half)
        try:
            self._model = self._layout.place(model, self._device)
            self._parameters = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
            self._optimizer = make_optimizer(self._parameters, recipe.optimizer)
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemory(f"{job.device}: weights and optimizer state do not fit: {error}") from error
        self._has_moments = True
        if resumed is not None and job.resume_dir is not None:
            targets = optimizer_tensors(self._optimizer, self._parameters)
            self._has_moments = restore_optimizer(job.resume_dir, resumed, targets, self._layout.load)
        self._loss_sum = Loss(self._model, device=self._device, half=half, compiled=self._first_compiled(resumed))
        self._placer = Placer(
            job,
            group=self._group,
            layout=self._layout,
            model=model,
            loss=self._loss_sum,
            device=self._device,
            device_name=self._device_name,
        )
        self._placement = self._common(self._placer.first(resumed))
        share = recipe.global_batch // self._group.size
        self._batches = Batches(
            shards,
            global_batch=recipe.global_batch,
            rows=slice(self._group.rank * share, (self._group.rank + 1) * share),
            seed=recipe.seed,
            data_key=job.data_key,
            device=self._device,
        )

    @property
    def step(self) -> int:
        """Steps done."""
        return self._step

    @property
    def total_steps(self) -> int:
        return self._job.total_steps

    @property
    def placement(self) -> Placement:
        """How steps are computed now; an out-of-memory changes it."""
        return self._placement

    @property
    def precision(self) -> str:
        """What the forward pass computes in: "bf16" or "fp32"."""
        return self._loss_sum.precision

    @property
    def computation(self) -> Computation:
        """How steps are computed now."""
        return Computation.on(
            self._device,
            precision=self.precision,
            micro_batch=self._placement.micro_batch,
            devices=self._group.size,
            sharded=self._layout.is_sharded,
            compiled=self._loss_sum.is_compiled,
        )

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self._parameters.values())

    def train_step(self) -> StepResult:
        """One optimizer step. Raises Diverged, OutOfDeviceMemory, InvalidState when all steps are done, and, where
        devices share a model, StartAgain; after that, this trainer and its group are of no use."""
        if self._step >= self._job.total_steps:
            raise InvalidState(f"all {self._job.total_steps} steps of {self._job.task_id} are done")
        self._call(Call.STEP)
        return self._train_step()

    def follow(self) -> None:
        """In a peer: makes what the first process makes, until that leaves."""
        if not self._layout.is_sharded:
            while self._step < self._job.total_steps:
                self._train_step()
            return
        while True:
            match call := self._group.call(Call.LEAVE):
                case Call.STEP:
                    self._train_step()
                case Call.SAVE | Call.SAVE_FINAL:
                    self._copies(final=call is Call.SAVE_FINAL)
                case Call.LEAVE:
                    return

    def _train_step(self) -> StepResult:
        # Until it is done, nobody listens.
        self._is_over = self._layout.is_sharded
        started = time.perf_counter()
        learning_rate = self._schedule.learning_rate(self._step)
        batch_BS = self._batches.get(self._step)
        figures: torch.Tensor | None = None
        while figures is None:
            figures = self._try_gradient(batch_BS)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._step += 1
        values = PendingValues(figures, self._step)
        self._pending.append(values)
        # On CUDA the newest step may still be running: look at the one before it.
        self._settle(keep=1 if self._device.type == "cuda" else 0)
        if self._group.rank == 0:
            faults.point("worker.step.after")
        self._is_over = False
        return StepResult(
            step=self._step,
            tokens=self._tokens,
            seconds=time.perf_counter() - started,
            learning_rate=learning_rate,
            values=values.read,
        )

    def snapshot(self, *, final: bool = False) -> Snapshot:
        """Copies everything into host memory; training may go on at once. `final` leaves the optimizer out.

        Raises Diverged rather than copy weights that are no longer numbers.
        """
        self._settle(keep=0)
        self._call(Call.SAVE_FINAL if final else Call.SAVE)
        weights, moments = self._copies(final=final)
        state = CheckpointState(
            task_id=self._job.task_id,
            kind=self._job.kind,
            step=self._step,
            total_steps=self._job.total_steps,
            recipe_sha256=self._job.recipe.training_sha256(),
            data_key=self._job.data_key,
            loss=self._loss,
            device=self._device_name,
            precision=self.precision,
            micro_batch=self._placement.micro_batch,
            gradient_checkpointing=self._placement.gradient_checkpointing,
            compiled=self._loss_sum.is_compiled,
            devices=self._group.size,
        )
        return Snapshot(state=state, weights=weights, optimizer=moments, skeleton=self._skeleton)

    def close(self) -> None:
        """Stops reading ahead, and the group's other processes. The device's memory is freed with the object."""
        self._batches.close()
        if self._group.size == 1 or self._group.rank > 0:
            return
        if self._is_over:
            self._group.abort()
            return
        try:
            if self._layout.is_sharded:
                self._group.call(Call.LEAVE)
            elif self._step < self._job.total_steps:
                self._group.agree(Outcome.STOPPED, [False] * len(self._parameters))
        except CbtmError as error:
            # They have ended by themselves, for the same reason as this one as a rule.
            _log.debug("the group has no need to be stopped: %s", error.message)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---------------------------------------------------------------------------------------------- one step

    def _try_gradient(self, batch_BS: torch.Tensor) -> torch.Tensor | None:
        """(loss, gradient norm) [2] with the gradient in place; None when it must be tried again, in another way.

        Weights and optimizer state are untouched either way. What one process of a group meets, all act on.
        """
        parameters = list(self._parameters.values())
        outcome, loss, failure = self._own_gradient(batch_BS)
        if self._layout.is_sharded and outcome is not Outcome.DONE:
            raise self._end(outcome, failure)
        agreed, present = self._group.agree(outcome, [p.grad is not None for p in parameters])
        if agreed is Outcome.DONE:
            assert loss is not None
            gradients = [p for p, has in zip(parameters, present, strict=True) if has]
            return self._layout.common_gradient(loss, gradients, self._job.recipe.optimizer.gradient_clip)
        self._optimizer.zero_grad(set_to_none=True)
        match agreed:
            case Outcome.OUT_OF_MEMORY:
                self._placement = self._placer.smaller(self._placement)
            case Outcome.NOT_DETERMINISTIC:
                make_deterministic(self._device, strict=False)
            case Outcome.NO_COMPILER:
                self._loss_sum.stop_compiling()
            case Outcome.STOPPED:
                raise GroupStopped
            case Outcome.FAILED:
                self._is_over = True
                if failure is None:
                    # Raises once the process that failed has ended, with what it said.
                    self._group.least([0])
                    raise InternalError("a process that failed to train on another device goes on")
                raise failure
        return None

    def _end(self, outcome: Outcome, failure: Exception | None) -> Exception:
        """What ends this process's part in a shared model; the others may be waiting in the middle of a pass."""
        match outcome:
            case Outcome.OUT_OF_MEMORY:
                smaller = self._placer.smaller(self._placement)
                return StartAgain(f"{self._job.device} ran out of memory", changes=asdict(smaller))
            case Outcome.NOT_DETERMINISTIC:
                return StartAgain("an operation has no deterministic form", changes={"deterministic": False})
        assert failure is not None
        return self._group.ended(failure) or failure

    def _own_gradient(self, batch_BS: torch.Tensor) -> tuple[Outcome, torch.Tensor | None, Exception | None]:
        """(how it went, this process's share of the loss, the defect): the gradient of this process's sequences."""
        try:
            return Outcome.DONE, self._gradient(batch_BS), None
        except torch.OutOfMemoryError:
            # Leaving this function drops the traceback, and with it the activations that its frames hold.
            return Outcome.OUT_OF_MEMORY, None, None
        except RuntimeError as error:
            if lacks_determinism(error):
                _log.warning("this model's steps will not repeat to the bit on %s: %s", self._job.device, error)
                return Outcome.NOT_DETERMINISTIC, None, None
            if self._loss_sum.is_compilers(error):
                reason = str(error).split("\n")[0]
                _log.warning("torch.compile does not work here, and training goes on without it: %s", reason)
                return Outcome.NO_COMPILER, None, None
            return Outcome.FAILED, None, error

    def _gradient(self, batch_bS: torch.Tensor) -> torch.Tensor:
        recipe, micro_batch = self._job.recipe, self._placement.micro_batch
        loss = torch.zeros((), device=self._device)
        # Micro-steps are numbered through the processes, as if one had them all.
        first = self._group.rank * (len(batch_bS) // micro_batch)
        for index, micro_bS in enumerate(torch.split(batch_bS, micro_batch), start=first):
            seed_draws(self._device, draw_seed(recipe.seed, self._job.data_key, self._step, index))
            if self._hook is not None:
                self._hook(self._step, index, len(micro_bS))
            loss += self._micro_step(micro_bS)
        return loss

    def _micro_step(self, micro_bS: torch.Tensor) -> torch.Tensor:
        """Adds the micro-batch's share of the gradient; returns its share of the loss."""
        # The sum over tokens divided by the global batch's tokens: shares add up to its mean.
        share = self._loss_sum(micro_bS).div(self._tokens)
        share.backward()  # type: ignore[no-untyped-call]
        return share.detach()

    def _settle(self, *, keep: int) -> None:
        """Waits for all but the last `keep` steps, and checks that they gave numbers."""
        while len(self._pending) > keep:
            values = self._pending.pop(0)
            loss, norm = values.read()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise Diverged(
                    f"{self._job.task_id}: at step {values.step} the loss is {loss} and the gradient's norm {norm};"
                    " a lower learning rate, a longer warm-up or gradient clipping may help"
                )
            self._loss = loss

    # ------------------------------------------------------------------------------------- group, placement

    def _call(self, call: Call) -> None:
        if not self._layout.is_sharded:
            return
        if self._is_over:
            raise InvalidState(f"{self._job.task_id}: the devices that shared its model have parted")
        self._group.call(call)

    def _copies(self, *, final: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
        """(weights; optimizer state, unless `final` or absent), in host memory."""
        self._is_over = self._layout.is_sharded
        # keep_vars gives the parameters themselves, by which tied weights are known.
        weights, moments = self._layout.host_copies(self._model.state_dict(keep_vars=True)), None
        if self._has_moments and not final:
            moments = self._layout.host_copies(optimizer_tensors(self._optimizer, self._parameters))
        self._is_over = False
        return weights, moments

    def _common(self, placement: Placement) -> Placement:
        """The one that fits every device of the group."""
        micro_batch, plain = self._group.least([placement.micro_batch, int(not placement.gradient_checkpointing)])
        return self._placer.adopt(Placement(micro_batch=micro_batch, gradient_checkpointing=not plain))

    def _first_compiled(self, resumed: CheckpointState | None) -> bool:
        if self._layout.is_sharded:
            return False
        if self._job.compile is not None:
            return self._job.compile
        if resumed is not None and resumed.device == self._device_name:
            # As it was computed, for the same bits.
            return resumed.compiled
        return self._device.type == "cuda"
