"""The loss of a micro-batch: what is computed forward, eagerly or compiled.

Compiled, the cross-entropy is fused with the model's last layer, so that float32 logits never lie in memory. A compiler
that is absent or fails costs the speed, nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel


class Loss:
    """Sum of the cross-entropy over a micro-batch's tokens, in nats. `half`: the model runs under bf16 autocast."""

    def __init__(self, model: PreTrainedModel, *, device: torch.device, half: bool, compiled: bool) -> None:
        self._model = model
        self._device = device
        self._half = half
        # What the forward pass computes in.
        self.precision = "bf16" if half else "fp32"
        self.is_compiled = compiled
        self._sum: Callable[[torch.Tensor], torch.Tensor] = _compile(self._plain) if compiled else self._plain

    def __call__(self, tokens_bS: torch.Tensor) -> torch.Tensor:
        """Of sequences of inputs and, one further on, targets."""
        with self._autocast():
            return self._sum(tokens_bS)

    def eager(self, tokens_bS: torch.Tensor) -> torch.Tensor:
        """The same, never compiled."""
        with self._autocast():
            return self._plain(tokens_bS)

    def is_compilers(self, error: RuntimeError) -> bool:
        """Whether the compiler failed, and not what it compiled."""
        from torch._dynamo.exc import TorchDynamoException

        return self.is_compiled and isinstance(error, TorchDynamoException)

    def stop_compiling(self) -> None:
        self.is_compiled = False
        self._sum = self._plain

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self._device.type, dtype=torch.bfloat16) if self._half else contextlib.nullcontext()

    def _plain(self, tokens_bS: torch.Tensor) -> torch.Tensor:
        logits_bLV: torch.Tensor = self._model(input_ids=tokens_bS[:, :-1], use_cache=False).logits
        return cross_entropy(logits_bLV.flatten(0, 1).float(), tokens_bS[:, 1:].flatten(), reduction="sum")


def _compile(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch._inductor

    # Kernels chosen by timing them would give other bits in another process. PyTorch before 2.10 has no such option.
    deterministic = "deterministic" in torch._inductor.list_options()
    # Micro-batches are all of one size: shapes are constants.
    return torch.compile(function, dynamic=False, options={"deterministic": True} if deterministic else None)
