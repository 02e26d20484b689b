"""AdamW (Loshchilov & Hutter, 2019, "Decoupled Weight Decay Regularization"), as the recipe has it.

Weight decay acts on matrices only: gains, biases and other vectors are not decayed. The state is allocated at once,
so that a step cannot run out of memory halfway through it, and has names, so that it can be written as plain tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cbtm_common.errors import IntegrityError
from cbtm_common.recipe import OptimizerRecipe

_FIELDS = ("step", "exp_avg", "exp_avg_sq")


def make_optimizer(parameters: Mapping[str, torch.nn.Parameter], recipe: OptimizerRecipe) -> torch.optim.AdamW:
    """AdamW over `parameters`, its moments zero. The learning rate is set at each step by the caller."""
    matrices = [p for p in parameters.values() if p.dim() >= 2]
    vectors = [p for p in parameters.values() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
        fused=next(iter(parameters.values())).device.type in ("cpu", "cuda"),
    )
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            # On the device, where the fused kernel reads it without a transfer.
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


def optimizer_tensors(
    optimizer: torch.optim.AdamW, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The state by name, `<parameter>.<field>`: the tensors themselves, not copies."""
    return {
        f"{name}.{field}": optimizer.state[parameter][field]
        for name, parameter in parameters.items()
        for field in _FIELDS
    }


def load_optimizer(tensors: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> None:
    """Copies saved tensors into `targets` (`optimizer_tensors`). IntegrityError unless names and shapes agree."""
    if set(tensors) != set(targets):
        odd = sorted(set(tensors) ^ set(targets))
        raise IntegrityError(f"optimizer state: {len(odd)} tensors are missing or unknown, the first is {odd[0]!r}")
    for name, target in targets.items():
        if tensors[name].shape != target.shape:
            raise IntegrityError(
                f"optimizer state: {name} has shape {tuple(tensors[name].shape)}, not {tuple(target.shape)}"
            )
        target.copy_(tensors[name])
