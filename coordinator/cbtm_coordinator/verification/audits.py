"""Replay audits: which segments between two commits are trained again, and what the comparison says.

Batch n is a function of the step alone, so whoever starts from the same checkpoint gets the same weights: to the bit
where the computation is the same, nearly elsewhere. Which segment is audited is drawn after it was committed; nobody
can train honestly only where it will be looked at. And an auditor can only say how the weights moved by moving them: it
says so before it may read what it is compared with (docs/decisions/0025-whose-word-counts.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

from cbtm_coordinator.verification.evaluation import Outcome

# Of the segments of a proven worker one in a hundred is trained again: 1 % of the training compute. Evaluations take
# less than another (docs/decisions/0018-verification.md), so that both stay under 2 %.
LEAST_RATE = 0.01
# A task is so many segments, however often its worker commits: what is at risk is steps.
SEGMENTS_OF_TASK = 20
# A longer segment counts as so many: its replay costs what it takes, and replays of a proven worker that commits seldom
# must not cost more than this many percent of its work.
MOST_SEGMENTS = 2.0
# The distance between two replays of a worker is even between none and so many times the usual.
_MOST_AT_RISK = 2.0
# Two honest replays are nearer to each other than this share of the distance that either moved; who invents weights is
# about as far from others as those moved.
_NEAR = 0.5
# Largest deviation of an honest replay, as a share of the distance that the weights moved in the segment. A segment
# that was not trained deviates by 1. Measured on a small model, 40 steps: 1e-5 with another micro-batch; 1.3 with half
# of the data, 1.4 in another order; 0.2 without the second half of a decaying schedule, which moves least.
_SAME_DEVICE_TYPE = 0.05
_REDUCED_PRECISION = 0.2
_OTHER_DEVICE_TYPE = 0.25


@dataclass(frozen=True, kw_only=True)
class AuditDecision:
    """`at_risk`: replays that its worker's work was worth since its last one."""

    audit: bool
    at_risk: float
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
    """What an auditor found. `deviation` is |w' - w| / |w - w0| over all weights; None when the bits are equal.

    `moved` is w' - w0 at places that the coordinator knows too, and `original_moved` what it says of w - w0 there; None
    where one of them is not known.
    """

    computation: Computation
    equal: bool
    deviation: float | None = None
    # Of the tensors' files that it wrote.
    digests: str = ""
    moved: tuple[float, ...] | None = None
    original_moved: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A replay, judged."""

    outcome: Outcome
    reason: str
    evidence: dict[str, object]
    digests: str = ""
    moved: tuple[float, ...] | None = None


def audit_rate(trust: float) -> float:
    """Share of a worker's segments that are audited: all of a new one's, one in a hundred of a proven one's."""
    return max(LEAST_RATE, (1.0 - trust) ** 2)


def wants_audit(trust: float, draw: float, *, at_risk: float, share: float) -> AuditDecision:
    """Whether a segment is trained again. `share`: its steps, of its task's; `at_risk`: what the last decision gave.

    `draw` is uniform in [0, 1), and drawn after the segment was committed.
    """
    rate = audit_rate(trust)
    worth = rate * min(MOST_SEGMENTS, share * SEGMENTS_OF_TASK)
    left = _MOST_AT_RISK - at_risk
    audit = rate >= 1.0 or worth >= left or draw < worth / left
    reason = f"trust {trust:.2f}: {rate:.0%} of its segments are trained again, {at_risk:.2f} replays are due"
    return AuditDecision(audit=audit, at_risk=0.0 if audit else at_risk + worth, reason=reason)


def compare(replay: Replay, original: Computation, *, dropout: bool) -> Finding:
    """Judges a replay of a segment that `original` computed."""
    ours = replay.computation
    sampled = _sampled_deviation(replay)
    evidence: dict[str, object] = {
        "original": asdict(original),
        "replay": asdict(ours),
        "equal": replay.equal,
        "deviation": replay.deviation,
        "sampled_deviation": sampled,
    }

    def finding(outcome: Outcome, reason: str) -> Finding:
        return Finding(outcome=outcome, reason=reason, evidence=evidence, digests=replay.digests, moved=replay.moved)

    if replay.equal:
        return finding(Outcome.PASSED, "the replay gives the same bits")
    if replay.original_moved is not None and replay.moved is None:
        return finding(Outcome.UNSURE, "the replay shows no weights: its worker is older than the coordinator")
    if ours == original and original.device_type == "cpu":
        return finding(Outcome.FAILED, "the same computation gives other weights")
    if dropout and (ours.device_type, ours.micro_batch) != (original.device_type, original.micro_batch):
        return finding(Outcome.UNSURE, "dropout draws differ between these devices")
    allowed = _tolerance(ours, original)
    # The larger of what it says of all weights and what its weights show. Not a number is never within it.
    found = [deviation for deviation in (replay.deviation, sampled) if deviation is not None]
    if replay.deviation is not None and all(deviation <= allowed for deviation in found):
        return finding(Outcome.PASSED, f"the replay deviates by {max(found):.3f}, {allowed} is allowed")
    told = f"{max(found):.3f}" if found else "an unknown share"
    return finding(
        Outcome.FAILED, f"the replay deviates by {told} of the distance trained, over the {allowed} of an honest one"
    )


def same_finding(a: Finding, b: Finding) -> bool:
    """Whether two auditors found the same: to condemn alike, they must have come to the same weights."""
    if a.outcome is not b.outcome:
        return False
    return a.outcome is not Outcome.FAILED or (a.digests != "" and a.digests == b.digests) or _are_near(a, b)


def cannot_both_be(a: Finding, b: Finding) -> bool:
    """Whether one of two auditors did not train what it says. Those that came to the same weights may judge them
    differently: one by bits, another by a tolerance.
    """
    if a.moved is None or b.moved is None:
        return a.outcome is not b.outcome
    return not _are_near(a, b)


def _are_near(a: Finding, b: Finding) -> bool:
    if a.moved is None or b.moved is None or len(a.moved) != len(b.moved):
        return False
    # Weights that are no number are near to none.
    return math.dist(a.moved, b.moved) <= _NEAR * min(math.hypot(*a.moved), math.hypot(*b.moved))


def _sampled_deviation(replay: Replay) -> float | None:
    """|w' - w| / |w - w0| at the places that are known; infinite where nothing moved, or other places are told."""
    if replay.moved is None or replay.original_moved is None:
        return None
    moved = math.hypot(*replay.original_moved)
    if len(replay.moved) != len(replay.original_moved) or moved == 0:
        return math.inf
    return math.dist(replay.moved, replay.original_moved) / moved


def _tolerance(ours: Computation, original: Computation) -> float:
    if ours.device_type != original.device_type:
        return _OTHER_DEVICE_TYPE
    if "bf16" in (ours.precision, original.precision):
        return _REDUCED_PRECISION
    return _SAME_DEVICE_TYPE
