"""Where weights, gradients and optimizer state of a model lie: whole on each device that trains it, or a share on each.

`Layout` is the whole; `sharding.Sharded` the shares. Not covered: starting again when memory runs out (`trainer`).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel

from cbtm_worker.train import memory
from cbtm_worker.train.checkpoint import host_copies
from cbtm_worker.train.group import Group, ProcessGroup
from cbtm_worker.train.job import Shard, TrainJob
from cbtm_worker.train.model import vocabulary_size

_log = logging.getLogger(__name__)


class Layout:
    """All of it on each device of `group`."""

    is_sharded = False
    # What a pass takes of a device for a while beside its activations, in bytes.
    gathered_bytes = 0

    def __init__(self, group: Group) -> None:
        self._group = group

    def place(self, model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
        """The model on its device; raises torch.OutOfMemoryError when that is too small."""
        placed: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
        return placed

    def common_gradient(
        self, loss: torch.Tensor, parameters: Sequence[torch.nn.Parameter], clip: float
    ) -> torch.Tensor:
        """(loss, gradient norm) [2] of the global batch, from each process's share of both; the gradients of
        `parameters` are then the same on all devices, clipped to a norm of `clip` unless that is 0."""
        for parameter in parameters:
            if parameter.grad is None:
                # Of an expert, say, that no token of this process was routed to.
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._group.sum([loss, *gradients])
        norm = torch.nn.utils.get_total_norm(gradients)
        if clip > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        return torch.stack((loss, norm))

    def load(self, target: torch.Tensor, whole: torch.Tensor) -> None:
        """Copies what this device holds of `whole` into `target`."""
        target.copy_(whole)

    def host_copies(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole copies in host memory, aliases kept as aliases. In the first process; elsewhere they may be absent."""
        return host_copies(tensors)


def choose_layout(job: TrainJob, group: Group, model: PreTrainedModel, device: torch.device, *, half: bool) -> Layout:
    """The same in all processes of `group`; `model` is still in host memory, `half` that passes compute in bf16.

    Raises InvalidArgument for a model that has to be shared and cannot be.
    """
    if not isinstance(group, ProcessGroup) or job.shard is Shard.NEVER:
        return Layout(group)
    if job.shard is Shard.AUTO:
        parameters = sum(p.numel() for p in model.parameters())
        # CPUs share one memory, and nobody has more of it by sharing the model.
        fits = device.type != "cuda" or memory.fits_whole(
            parameters=parameters,
            pass_bytes=memory.sequence_bytes_of(model.config, vocabulary_size(model), job.recipe.sequence_length, half),
            free_bytes=_free_bytes(device),
        )
        if group.least([int(fits)]) == [1]:
            return Layout(group)
        needed = parameters * memory.STATE_BYTES_PER_PARAMETER / 1e9
        _log.warning("training takes %.1f GB and activations, too much for one device: %d share it", needed, group.size)
    from cbtm_worker.train.sharding import Sharded

    return Sharded(group, half=half)


def _free_bytes(device: torch.device) -> int:
    # What is left of the task before counts as free.
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
