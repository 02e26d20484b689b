"""Replay audits: which segments between two commits are trained again, and what the comparison says.

Batch n is a function of the step alone, so whoever starts from the same checkpoint gets the same weights: to the bit
where the computation is the same, nearly elsewhere. Which segment is audited is drawn after it was committed; nobody
can train honestly only where it will be looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

from cbtm_coordinator.verification.evaluation import Outcome, Verdict

# Of the segments of a proven worker one in a hundred is trained again: 1 % of the training compute. Evaluations take
# less than another (docs/decisions/0018-verification.md), so that both stay under 2 %.
LEAST_RATE = 0.01
# Largest deviation of an honest replay, as a share of the distance that the weights moved in the segment. A segment
# that was not trained deviates by 1. Measured on a small model, 40 steps: 1e-5 with another micro-batch; 1.3 with half
# of the data, 1.4 in another order; 0.2 without the second half of a decaying schedule, which moves least.
_SAME_DEVICE_TYPE = 0.05
_REDUCED_PRECISION = 0.2
_OTHER_DEVICE_TYPE = 0.25


@dataclass(frozen=True, kw_only=True)
class AuditDecision:
    audit: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Computation:
    """How a segment was computed, as its worker says. Equal ones give equal bits.

    `environment` names the device, the instruction set, the threads and the version of torch.
    """

    device_type: str
    environment: str
    precision: str
    micro_batch: int
    # Of torch, on a CPU; 0 elsewhere.
    threads: int = 0

    @classmethod
    def of(cls, said: Mapping[str, object]) -> Self:
        """From what a worker says beside a commit; what is missing or odd is equal to nothing."""

        def words(name: str) -> str:
            return str(said.get(name) or "")

        def count(name: str) -> int:
            number = said.get(name)
            return int(number) if isinstance(number, int | float) and 0 <= number < 1e9 else 0

        return cls(
            device_type=words("device_type"),
            environment=words("environment"),
            precision=words("precision"),
            micro_batch=count("micro_batch"),
            threads=count("threads"),
        )


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What an auditor found. `deviation` is |w' - w| / |w - w0| over all weights; None when the bits are equal."""

    computation: Computation
    equal: bool
    deviation: float | None = None


def audit_rate(trust: float) -> float:
    """Share of a worker's segments that are audited: all of a new one's, one in a hundred of a proven one's."""
    return max(LEAST_RATE, (1.0 - trust) ** 2)


def wants_audit(trust: float, draw: float) -> AuditDecision:
    """`draw` is uniform in [0, 1), and drawn after the segment was committed."""
    rate = audit_rate(trust)
    return AuditDecision(audit=draw < rate, reason=f"trust {trust:.2f}: {rate:.0%} of its segments are trained again")


def compare(replay: Replay, original: Computation, *, dropout: bool) -> Verdict:
    """Judges a replay of a segment that `original` computed."""
    ours = replay.computation
    evidence: dict[str, object] = {
        "original": asdict(original),
        "replay": asdict(ours),
        "equal": replay.equal,
        "deviation": replay.deviation,
    }

    def verdict(outcome: Outcome, reason: str) -> Verdict:
        return Verdict(outcome=outcome, reason=reason, evidence=evidence)

    if replay.equal:
        return verdict(Outcome.PASSED, "the replay gives the same bits")
    if ours == original and original.device_type == "cpu":
        return verdict(Outcome.FAILED, "the same computation gives other weights")
    if dropout and (ours.device_type, ours.micro_batch) != (original.device_type, original.micro_batch):
        return verdict(Outcome.UNSURE, "dropout draws differ between these devices")
    allowed = _tolerance(ours, original)
    # Not a number is never within it.
    if replay.deviation is not None and replay.deviation <= allowed:
        return verdict(Outcome.PASSED, f"the replay deviates by {replay.deviation:.3f}, {allowed} is allowed")
    found = "an unknown share" if replay.deviation is None else f"{replay.deviation:.3f}"
    return verdict(
        Outcome.FAILED, f"the replay deviates by {found} of the distance trained, over the {allowed} of an honest one"
    )


def _tolerance(ours: Computation, original: Computation) -> float:
    if ours.device_type != original.device_type:
        return _OTHER_DEVICE_TYPE
    if "bf16" in (ours.precision, original.precision):
        return _REDUCED_PRECISION
    return _SAME_DEVICE_TYPE
