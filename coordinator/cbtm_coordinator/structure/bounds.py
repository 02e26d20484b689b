"""How far weights may honestly have moved: pure decisions on root mean squares, each with its reason.

AdamW bounds its own steps. With m and v the moments, |m| <= (1 - b1) sum b1^i |g| and v = (1 - b2) sum b2^i g^2, so by
Cauchy-Schwarz |m| / sqrt(v) <= (1 - b1) / sqrt((1 - b2) (1 - b1^2 / b2)) when b1^2 < b2: 1.17 for betas of 0.9 and
0.95, and bias correction does not raise it. A value thus moves at most that times the learning rate in a step, and so
does the root mean square of a tensor. Decay only shrinks it. What is beyond that was not computed by the recipe,
whatever the data; what is within may still be wrong in ways that only running the model shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cbtm_common.recipe import OptimizerRecipe
from cbtm_coordinator.structure.architecture import Size

# Times the bound above: machines differ in rounding, and one that resumes its own checkpoint does not pass exactly
# through the one that is compared with.
REACH_SLACK = 2.0
# Beside the reach, relative to the checkpoint before: rounding of the sums, and the same again.
RELATIVE_SLACK = 0.02
# Against what the task started from, however many steps: a tensor that grew or shrank so far is no fine-tuned one.
MAX_GROWTH = 100.0
# Tensors that start at 0 (biases) or small may grow to MAX_GROWTH times this.
MIN_SCALE = 0.1
# Share of subnormal values; trained weights have none, but a base model may.
MAX_SUBNORMALS = 0.01
# Times what clipping allows the moments to be.
CLIP_SLACK = 2.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`reason` is empty when all is well; else it names the check, and `found` and `allowed` are the evidence."""

    reason: str = ""
    found: str = ""
    allowed: str = ""


FINE = Verdict()


def update_bound(optimizer: OptimizerRecipe) -> float:
    """The most that a value moves in one step, in learning rates; infinite where the betas give no bound."""
    b1, b2 = optimizer.beta1, optimizer.beta2
    if b1**2 >= b2:
        return math.inf
    return max(1.0, (1 - b1) / math.sqrt((1 - b2) * (1 - b1**2 / b2)))


def reach(optimizer: OptimizerRecipe, *, learning_rate: float, steps: int) -> float:
    """How far the root mean square of a tensor may move in `steps`, at no more than `learning_rate`."""
    return REACH_SLACK * update_bound(optimizer) * learning_rate * steps


def judge_size(size: Size, *, before: Size, start: Size, reach: float, shrink: float) -> Verdict:
    """Of one tensor of weights, against the checkpoint before and what the task started from.

    `reach` as above, since the checkpoint before; `shrink` is the factor that weight decay may have left of it.
    """
    most_subnormal = max(MAX_SUBNORMALS, 2 * start.subnormals)
    if size.subnormals > most_subnormal:
        return Verdict(reason="subnormal", found=f"{size.subnormals:.3g}", allowed=f"at most {most_subnormal:.3g}")
    high = before.rms * (1 + RELATIVE_SLACK) + reach
    low = max(0.0, before.rms * shrink * (1 - RELATIVE_SLACK) - reach)
    high = min(high, MAX_GROWTH * max(start.rms, MIN_SCALE))
    low = max(low, start.rms / MAX_GROWTH)
    if not low <= size.rms <= high:
        return Verdict(reason="norm", found=f"{size.rms:.6g}", allowed=f"{low:.6g} to {high:.6g}")
    return FINE


def shrink(optimizer: OptimizerRecipe, *, learning_rate: float, steps: int) -> float:
    """What weight decay leaves of a value at least, after `steps` at `learning_rate`."""
    return max(0.0, 1 - learning_rate * optimizer.weight_decay) ** steps


def judge_moments(optimizer: OptimizerRecipe, *, first_squares: float, second: float) -> Verdict:
    """Of all first moments' squares and all second moments, summed over the model: clipping bounds both by clip^2."""
    if optimizer.gradient_clip == 0:
        return FINE
    most = CLIP_SLACK * optimizer.gradient_clip**2
    worst = max(first_squares, second)
    if not worst <= most:
        return Verdict(reason="moments", found=f"{worst:.6g}", allowed=f"at most {most:.6g}")
    return FINE
