"""The mixture itself: p(x) = Σ_j w_j · p_j(x), of probabilities and not of logits (c-BTM, arXiv 2303.14177, Eq. 1).

Pure functions and one accumulator, in log space, so that experts may be added one at a time, in any order and on any
rows, and no more than one expert's output is held besides the sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class LogMixture:
    """log Σ_j w_j · p_j, built up expert by expert: [N, V], float32."""

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        self._rows = rows
        self._vocabulary = vocabulary
        self._device = device
        self._sum_NV: torch.Tensor | None = None

    def add(self, rows_R: torch.Tensor | None, log_probs_RV: torch.Tensor, weights_R: torch.Tensor) -> None:
        """Adds one expert on `rows_R`, or on all where None; its weights there are above 0. Takes over `log_probs_RV`.

        Weights are taken to log space in their own precision: float64 keeps those too small for float32.
        """
        import torch

        log_weights_R1 = weights_R.log().to(log_probs_RV.device, torch.float32).unsqueeze(-1)
        share_RV = (log_probs_RV.float() + log_weights_R1).to(self._device)
        if rows_R is None and self._sum_NV is None:
            self._sum_NV = share_RV
            return
        if self._sum_NV is None:
            self._sum_NV = torch.full(
                (self._rows, self._vocabulary), -torch.inf, device=self._device, dtype=torch.float32
            )
        if rows_R is None:
            torch.logaddexp(self._sum_NV, share_RV, out=self._sum_NV)
        else:
            self._sum_NV[rows_R] = torch.logaddexp(self._sum_NV[rows_R], share_RV)

    def result(self) -> torch.Tensor:
        """Rows to which no expert was added are -inf."""
        import torch

        if self._sum_NV is None:
            return torch.full((self._rows, self._vocabulary), -torch.inf, device=self._device, dtype=torch.float32)
        return self._sum_NV


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, in float32 whatever the model's dtype."""
    import torch

    return torch.log_softmax(logits.float(), dim=-1)


def target_log_probs(logits_PV: torch.Tensor, targets_P: torch.Tensor) -> torch.Tensor:
    """log p(target) in float32, [P], without a second array of the size of the logits in float32 models."""
    logits_PV = logits_PV.float()
    chosen_P = logits_PV.gather(-1, targets_P.unsqueeze(-1)).squeeze(-1)
    return chosen_P - logits_PV.logsumexp(dim=-1)
