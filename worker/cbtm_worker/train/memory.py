"""How a global batch is cut to fit a device: pure decisions, no torch.

A micro-batch always divides the global batch, so that every micro-step weighs the same and the mean gradient is the
recipe's whatever the cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# float32 weights, gradients and AdamW's two moments.
STATE_BYTES_PER_PARAMETER = 16
# Activations that a CPU's micro-batch may take: little, since caches reward it. A constant, so that the cut, and with
# it rounding and dropout's draw, is the same on every CPU.
CPU_ACTIVATION_BYTES = 128 << 20
# Of the free memory; the rest is lost between the allocator's blocks, or taken by a display.
_SHARE_USED = 0.92
# Micro-batch to try first once activations are recomputed: they shrink about that much.
_CHECKPOINTED_MICRO_BATCH = 8


@dataclass(frozen=True, kw_only=True)
class Placement:
    """A worker's choice of how to compute a step; it changes rounding and dropout's draw, nothing else."""

    micro_batch: int
    gradient_checkpointing: bool = False


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`, and at least 1."""
    return next(d for d in range(max(1, min(number, limit)), 0, -1) if number % d == 0)


def sequence_bytes(*, sequence_length: int, vocab_size: int, hidden_size: int, layers: int, half: bool) -> int:
    """About what one sequence of a micro-batch takes between its forward and backward pass.

    34 bytes a token, unit and layer in half precision without attention matrices (Korthikanti et al., 2022,
    "Reducing Activation Recomputation in Large Transformer Models", Eq. 1), and logits with their gradient.
    """
    activations = 34 * hidden_size * layers * (1 if half else 2)
    logits = (12 if half else 16) * vocab_size
    return sequence_length * (activations + logits)


def sequence_bytes_of(config: Any, vocab_size: int, sequence_length: int, half: bool) -> int:
    """The same for a model with transformers' `config`."""
    text = config.get_text_config()
    return sequence_bytes(
        sequence_length=sequence_length,
        vocab_size=vocab_size,
        hidden_size=int(text.hidden_size),
        layers=int(text.num_hidden_layers),
        half=half,
    )


def fits_whole(*, parameters: int, pass_bytes: int, free_bytes: int) -> bool:
    """Whether a device with `free_bytes` holds a model's training state, and a pass that takes `pass_bytes`."""
    return parameters * STATE_BYTES_PER_PARAMETER + pass_bytes <= _SHARE_USED * free_bytes


def left_for_activations(*, free_bytes: int, gathered_bytes: int) -> int:
    """Of a device that holds its share of a model, once what it gathers for a while is counted."""
    return max(0, int(_SHARE_USED * free_bytes) - gathered_bytes)


def sequences_that_fit(peak_bytes: Callable[[int], int | None], *, budget: int) -> int:
    """How many sequences one pass may hold in `budget` bytes, from measured passes of one and two; 0 for not even one.

    `peak_bytes` runs a pass of so many sequences: its peak memory, or None when memory ran out. A pass takes memory of
    its own and as much again for each sequence, so two measurements tell all others.
    """
    one = peak_bytes(1)
    if one is None:
        return 0
    two = peak_bytes(2)
    if two is None:
        return 1
    each = max(1, two - one)
    return max(1, (int(_SHARE_USED * budget) - (one - each)) // each)


def after_out_of_memory(
    placement: Placement, *, global_batch: int, can_checkpoint: bool
) -> tuple[Placement | None, str]:
    """(what to try next, or None when nothing is left; why, for a person)."""
    micro, recompute = placement.micro_batch, placement.gradient_checkpointing
    if micro > 1:
        smaller = largest_divisor(global_batch, micro // 2)
        reason = f"a micro-batch of {micro} does not fit the device; going on with {smaller}"
        return Placement(micro_batch=smaller, gradient_checkpointing=recompute), reason
    if can_checkpoint and not recompute:
        restart = largest_divisor(global_batch, _CHECKPOINTED_MICRO_BATCH)
        reason = f"a micro-batch of 1 does not fit the device; recomputing activations, with {restart}"
        return Placement(micro_batch=restart, gradient_checkpointing=True), reason
    return None, "a micro-batch of 1 does not fit the device, with activations recomputed where the model can"
