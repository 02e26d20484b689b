"""The loss of a micro-batch: what is computed forward, eagerly or compiled.

Compiled, the cross-entropy is fused with the model's last layer, so that float32 logits never lie in memory. A compiler
that is absent or fails costs a warning and the speed, nothing else.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

_log = logging.getLogger(__name__)


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

    def give_up_compiling(self, error: RuntimeError) -> bool:
        """Goes on eagerly after an error of the compiler; False for any other error."""
        from torch._dynamo.exc import TorchDynamoException

        if not self.is_compiled or not isinstance(error, TorchDynamoException):
            return False
        _log.warning("torch.compile does not work here, and training goes on without it: %s", str(error).split("\n")[0])
        self.is_compiled = False
        self._sum = self._plain
        return True

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
