"""A model that devices of one machine share, each with a part of every tensor, by PyTorch's `fully_shard` (FSDP2).

Each transformer block is gathered for the time that it computes, the rest of the model for a whole pass. Gradients are
summed in float32 as soon as they are there, so that a device never holds more than its share of them for long. Weights
stay float32; where passes compute in bf16, blocks are gathered in bf16, which is what autocast would make of them.

What a process holds of a tensor is what `torch.chunk` gives along its first dimension. Not covered: failures; all
processes must make the same calls (`Group.call`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from cbtm_common.errors import InvalidArgument
from cbtm_worker.train.checkpoint import host_copies
from cbtm_worker.train.group import ProcessGroup
from cbtm_worker.train.layout import Layout

# Of a parameter that is gathered, at most: float32, its gradient, and the copies that collectives read and write.
_GATHERED_BYTES = 16
# The block that computes, and the next one on its way.
_BLOCKS_AT_ONCE = 2


class Sharded(Layout):
    """A share on each device of `group`. `half`: passes run under bf16 autocast."""

    is_sharded = True

    def __init__(self, group: ProcessGroup, *, half: bool) -> None:
        super().__init__(group)
        self._processes = group
        self._half = half

    def place(self, model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
        """Raises InvalidArgument for a model that does not name its blocks."""
        blocks = blocks_of(model)
        sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
        rest = sum(p.numel() for p in model.parameters()) - sum(sizes)
        self.gathered_bytes = _GATHERED_BYTES * (rest + _BLOCKS_AT_ONCE * max(sizes))
        mesh = DeviceMesh.from_group(self._processes.devices, device.type)
        # Under autocast, activations between blocks are float32: a unit must not cast its inputs.
        exact = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        within = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if self._half else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=within)
        fully_shard(model, mesh=mesh, mp_policy=exact)
        for unit in _units(model):
            # Shares of the mean add up to the mean. Gloo knows sums alone.
            unit.set_force_sum_reduction_for_comms(True)
            unit.set_gradient_divide_factor(1.0)
            if hasattr(unit, "set_reduce_scatter_unused_params"):
                # Of an expert, say, that no token of this process was routed to. PyTorch before 2.13 cannot.
                unit.set_reduce_scatter_unused_params(True, recurse=False)
        return model

    def common_gradient(
        self, loss: torch.Tensor, parameters: Sequence[torch.nn.Parameter], clip: float
    ) -> torch.Tensor:
        gradients = [_local(p.grad) for p in parameters if p.grad is not None]
        squares = torch.nn.utils.get_total_norm(gradients).square()
        self._group.sum([loss, squares])
        norm = squares.sqrt()
        if clip > 0:
            # As torch.nn.utils.clip_grads_with_norm_ does.
            scale = (clip / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(scale)
        return torch.stack((loss, norm))

    def load(self, target: torch.Tensor, whole: torch.Tensor) -> None:
        if not isinstance(target, DTensor):
            target.copy_(whole)
            return
        parts = torch.chunk(whole, self._group.size)
        if self._group.rank < len(parts):
            target.to_local().copy_(parts[self._group.rank])

    def host_copies(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        shared = {id(t): t for t in tensors.values() if isinstance(t, DTensor)}
        copies = host_copies({name: t for name, t in tensors.items() if id(t) not in shared})
        whole = {key: self._gathered(tensor) for key, tensor in shared.items()}
        # In the order of `tensors`.
        return {name: whole[id(t)] if id(t) in whole else copies[name] for name, t in tensors.items()}

    def _gathered(self, tensor: DTensor) -> torch.Tensor:
        """The whole tensor, in the first process; empty in others, which only send their share of it."""
        mine = _local(tensor).detach().cpu()
        if self._group.rank > 0:
            if mine.numel():
                self._processes.send(mine)
            return torch.empty(0)
        whole = torch.empty(tensor.shape, dtype=tensor.dtype)
        first, *others = torch.chunk(whole, self._group.size)
        first.copy_(mine)
        for rank, part in enumerate(others, start=1):
            self._processes.receive(part, rank)
        return whole


def blocks_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The transformer blocks: the outermost of what transformers must not split.

    Raises InvalidArgument for a model that names none.
    """
    names = set(model._no_split_modules or ())
    blocks: list[torch.nn.Module] = []
    within: set[torch.nn.Module] = set()
    for module in model.modules():
        if type(module).__name__ in names and module not in within:
            blocks.append(module)
            within.update(module.modules())
    if not blocks:
        raise InvalidArgument(
            f"shard: {type(model).__name__} does not say what its blocks are, so that devices cannot share it: use"
            " devices that hold all of it, with --shard never",
            field="shard",
        )
    return blocks


def _units(model: PreTrainedModel) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
