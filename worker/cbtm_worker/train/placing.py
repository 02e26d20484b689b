"""Chooses how a batch is cut for a device: what was asked for, or used before, or fits by a probe of its memory.

The decisions themselves are pure, in `memory`; here they meet the model and the device.
"""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from cbtm_worker.train import memory
from cbtm_worker.train.checkpoint import CheckpointState
from cbtm_worker.train.errors import OutOfDeviceMemory
from cbtm_worker.train.group import Group
from cbtm_worker.train.job import TrainJob
from cbtm_worker.train.layout import Layout
from cbtm_worker.train.loss import Loss
from cbtm_worker.train.memory import Placement
from cbtm_worker.train.model import lacks_determinism, make_deterministic, vocabulary_size
from cbtm_worker.train.placement_cache import PlacementCache, placement_key

_log = logging.getLogger(__name__)


class Placer:
    """For one model on one device of `group`, among whose devices each step's sequences are dealt evenly."""

    def __init__(
        self,
        job: TrainJob,
        *,
        group: Group,
        layout: Layout,
        model: PreTrainedModel,
        loss: Loss,
        device: torch.device,
        device_name: str,
    ) -> None:
        self._job = job
        self._batch = job.recipe.global_batch // group.size
        self._layout = layout
        self._model = model
        self._loss = loss
        self._device = device
        self._device_name = device_name
        self._cache = PlacementCache(job.placement_cache)
        self._key = placement_key(
            model.config.to_dict(),
            sequence_length=job.recipe.sequence_length,
            precision=loss.precision,
            device=device_name,
            device_bytes=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0,
            shares=group.size if layout.is_sharded else 1,
        )

    def first(self, resumed: CheckpointState | None) -> Placement:
        """What to begin with."""
        job = self._job
        if job.micro_batch is not None:
            found = Placement(micro_batch=job.micro_batch)
        elif resumed is not None and resumed.device == self._device_name:
            # The same cut gives the same bits as a run that was never interrupted.
            found = Placement(micro_batch=resumed.micro_batch, gradient_checkpointing=resumed.gradient_checkpointing)
        else:
            found = self._cache.get(self._key) or self._fitting()
        return Placement(
            micro_batch=memory.largest_divisor(self._batch, found.micro_batch),
            gradient_checkpointing=found.gradient_checkpointing or job.gradient_checkpointing,
        )

    def adopt(self, placement: Placement) -> Placement:
        """Begins with it: activations are recomputed from here on if it says so."""
        if placement.gradient_checkpointing:
            self._checkpoint_activations()
        return placement

    def smaller(self, placement: Placement) -> Placement:
        """After an out-of-memory. Raises OutOfDeviceMemory when nothing smaller is left."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        smaller, reason = memory.after_out_of_memory(
            placement, global_batch=self._batch, can_checkpoint=bool(self._model.supports_gradient_checkpointing)
        )
        if smaller is None:
            raise OutOfDeviceMemory(f"{self._job.device}: {reason}")
        _log.warning("%s", reason)
        if smaller.gradient_checkpointing and not placement.gradient_checkpointing:
            self._checkpoint_activations()
        self._cache.put(self._key, smaller)
        return smaller

    def _fitting(self) -> Placement:
        on_cuda = self._device.type == "cuda"
        if on_cuda and not self._layout.is_sharded:
            found = self._probed()
            self._cache.put(self._key, found)
            return found
        # A probe of a shared model that runs out of memory would be its group's end.
        budget = memory.CPU_ACTIVATION_BYTES
        if on_cuda:
            budget = memory.left_for_activations(
                free_bytes=self._free_bytes(), gathered_bytes=self._layout.gathered_bytes
            )
        sequence = memory.sequence_bytes_of(
            self._model.config,
            vocabulary_size(self._model),
            self._job.recipe.sequence_length,
            half=self._loss.precision == "bf16",
        )
        return Placement(micro_batch=max(1, budget // sequence))

    def _probed(self) -> Placement:
        fits = memory.sequences_that_fit(self._peak_bytes, budget=self._free_bytes())
        if fits or not self._model.supports_gradient_checkpointing:
            return Placement(micro_batch=max(1, fits))
        self._checkpoint_activations()
        fits = memory.sequences_that_fit(self._peak_bytes, budget=self._free_bytes())
        return Placement(micro_batch=max(1, fits), gradient_checkpointing=True)

    def _free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self._device)[0]

    def _peak_bytes(self, micro_batch: int) -> int | None:
        """Peak memory of a forward and backward pass, gradients included; None when there is too little.

        Not compiled: that takes no more, and a compilation for each size would take minutes.
        """
        length = self._job.recipe.sequence_length + 1
        tokens = torch.arange(micro_batch * length, device=self._device) % vocabulary_size(self._model)
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_allocated(self._device)
        try:
            self._loss.eager(tokens.view(micro_batch, length)).backward()  # type: ignore[no-untyped-call]
            return torch.cuda.max_memory_allocated(self._device) - before
        except torch.OutOfMemoryError:
            return None
        except RuntimeError as error:
            if not lacks_determinism(error):
                raise
            _log.warning("this model's steps will not repeat to the bit on %s: %s", self._job.device, error)
            make_deterministic(self._device, strict=False)
        finally:
            self._model.zero_grad(set_to_none=True)
        return self._peak_bytes(micro_batch)

    def _checkpoint_activations(self) -> None:
        # The second name is what older releases of transformers have.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable = next(getattr(self._model, name) for name in names if hasattr(self._model, name))
        enable({"use_reentrant": False})
