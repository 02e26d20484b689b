"""AdamW (Loshchilov & Hutter, 2019, "Decoupled Weight Decay Regularization"), as the recipe has it.

Weight decay acts on matrices only: gains, biases and other vectors are not decayed. The state is allocated at once,
so that a step cannot run out of memory halfway through it, and has names, so that it can be written as plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from cbtm_common.errors import IntegrityError
from cbtm_common.recipe import OptimizerRecipe
from cbtm_worker.train.checkpoint import OPTIMIZER, CheckpointState, read_optimizer

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


def restore_optimizer(
    directory: Path,
    state: CheckpointState,
    targets: Mapping[str, torch.Tensor],
    copy: Callable[[torch.Tensor, torch.Tensor], object],
) -> bool:
    """`copy(target, saved)` for each of `targets` (`optimizer_tensors`), from the checkpoint in `directory`.

    False when that is a final one, which has no optimizer and needs none: nothing is left to train. Raises
    IntegrityError when it should have one, or names and shapes do not agree.
    """
    if not (directory / OPTIMIZER).exists():
        if state.step < state.total_steps:
            raise IntegrityError(f"{directory}: step {state.step} of {state.total_steps}, without {OPTIMIZER}")
        return False
    saved = read_optimizer(directory)
    if set(saved) != set(targets):
        odd = sorted(set(saved) ^ set(targets))
        raise IntegrityError(f"optimizer state: {len(odd)} tensors are missing or unknown, the first is {odd[0]!r}")
    with torch.no_grad():
        for name, target in targets.items():
            if saved[name].shape != target.shape:
                raise IntegrityError(
                    f"optimizer state: {name} has shape {tuple(saved[name].shape)}, not {tuple(target.shape)}"
                )
            copy(target, saved[name])
    return True
