"""One evaluator's scores of a submitted model, judged against the model that its task branched from.

Losses are means over sequences, in nats a token. A difference counts beyond `_SIGMAS` standard errors of the sequences
scored: what the measurement cannot tell apart is UNSURE, and then a replay of the training decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import median
from typing import Any, Self

# Of two normal tails together 0.3 %: an honest model is seldom UNSURE, and never refused, for noise alone.
_SIGMAS = 3.0
# What a run learns of itself counts from so many accepted models on.
_HISTORY = 3
# An expert must gain this share of what accepted ones typically gained. Clusters differ: honest gains in one run were
# up to 3 times apart, so a tenth leaves three times more; who does a tenth of the work is for audits to find.
_GAIN_SHARE = 0.1
# A specialised model gets worse on other text, in one run by up to 0.6 nats. So much at least is allowed, or so many
# times what accepted experts typically lost.
_CANARY_NATS = 1.0
_CANARY_RATIO = 3.0
# A claimed loss is of one batch, with dropout, and one step older than the weights; a measured one of some sequences.
_CLAIM_NATS = 0.25
_CLAIM_SHARE = 0.1
# Two honest evaluators score the same sequences, and differ by rounding alone, bf16 against float32 included.
_AGREE_NATS = 0.02
_AGREE_SHARE = 0.01


class Outcome(StrEnum):
    PASSED = "PASSED"
    FAILED = "FAILED"
    # The measurement does not tell.
    UNSURE = "UNSURE"


@dataclass(frozen=True, kw_only=True)
class Score:
    """Of one set of sequences. Deviations are standard deviations over sequences, not of the means."""

    sequences: int
    # Of the model that the task branched from, and of the submitted one.
    base_loss: float
    loss: float
    loss_deviation: float
    # Of base_loss - loss, sequence by sequence.
    gain_deviation: float

    @property
    def gain(self) -> float:
        return self.base_loss - self.loss

    @property
    def gain_error(self) -> float:
        """Standard error of `gain`."""
        return self.gain_deviation / math.sqrt(self.sequences)

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, (self.base_loss, self.loss, self.loss_deviation, self.gain_deviation)))


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """`own`: held-out text of the task's cluster; `train`: text that it trained on; `canary`: text of other clusters,
    None where there are none.
    """

    own: Score
    train: Score
    canary: Score | None = None

    @classmethod
    def of(cls, said: Mapping[str, Mapping[str, Any]]) -> Self:
        """From what `asdict` gives of each score."""
        return cls(**{name: Score(**score) for name, score in said.items()})

    @property
    def scores(self) -> dict[str, Score]:
        return {"own": self.own, "train": self.train, **({"canary": self.canary} if self.canary else {})}

    def agrees_with(self, other: Evaluation) -> bool:
        """Whether two evaluators measured the same, up to rounding."""
        mine, others = self.scores, other.scores
        return mine.keys() == others.keys() and all(_agree(mine[name], others[name]) for name in mine)


@dataclass(frozen=True, kw_only=True)
class History:
    """What accepted models of the same run and kind measured: their gains, and how much worse the canary became."""

    gains: Sequence[float] = ()
    canary_rises: Sequence[float] = ()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    outcome: Outcome
    reason: str
    evidence: dict[str, object]


def judge(evaluation: Evaluation, history: History, *, claimed_loss: float | None, batch_sequences: int) -> Verdict:
    """FAILED when any check fails, else UNSURE when any cannot tell, else PASSED.

    `claimed_loss` is what the worker said of its last batch, of `batch_sequences` sequences; None: it said nothing.
    """
    evidence: dict[str, object] = {
        "scores": {name: asdict(score) for name, score in evaluation.scores.items()},
        "claimed_loss": claimed_loss,
    }
    if not all(score.is_finite for score in evaluation.scores.values()):
        return Verdict(outcome=Outcome.FAILED, reason="the model's loss is not a finite number", evidence=evidence)
    found = [
        _judge_gain(evaluation.own, history),
        _judge_canary(evaluation.canary, history),
        _judge_claim(evaluation.train, claimed_loss, batch_sequences),
    ]
    worst = next(
        (o for o in (Outcome.FAILED, Outcome.UNSURE) if any(o is outcome for outcome, _ in found)), Outcome.PASSED
    )
    reasons = [reason for outcome, reason in found if outcome is worst and reason]
    return Verdict(outcome=worst, reason="; ".join(reasons), evidence=evidence)


def _judge_gain(own: Score, history: History) -> tuple[Outcome, str]:
    needed = _GAIN_SHARE * median(history.gains) if len(history.gains) >= _HISTORY else 0.0
    slack = _SIGMAS * own.gain_error
    measured = f"it gains {own.gain:.4f} ± {slack:.4f} nats a token on its own held-out text"
    # A seed handed back gains exactly 0 with no error at all.
    if own.gain + slack <= needed:
        return Outcome.FAILED, f"{measured}; more than {needed:.4f} is expected"
    if own.gain - slack <= needed:
        return Outcome.UNSURE, f"{measured}; whether that is more than {needed:.4f} cannot be told"
    return Outcome.PASSED, measured


def _judge_canary(canary: Score | None, history: History) -> tuple[Outcome, str]:
    if canary is None:
        return Outcome.PASSED, ""
    learned = len(history.canary_rises) >= _HISTORY
    allowed = max(_CANARY_NATS, _CANARY_RATIO * median(history.canary_rises) if learned else 0.0)
    rise = -canary.gain
    if rise - _SIGMAS * canary.gain_error <= allowed:
        return Outcome.PASSED, ""
    reason = f"text of other clusters became worse by {rise:.2f} nats a token, over the {allowed:.2f} allowed"
    # How far an honest expert of this run drifts is not known yet.
    return (Outcome.FAILED if learned else Outcome.UNSURE), reason


def _judge_claim(train: Score, claimed: float | None, batch_sequences: int) -> tuple[Outcome, str]:
    if claimed is None:
        return Outcome.UNSURE, "its worker claimed no loss"
    error = train.loss_deviation * math.sqrt(1 / batch_sequences + 1 / train.sequences)
    allowed = _CLAIM_NATS + _CLAIM_SHARE * train.loss + _SIGMAS * error
    # Not a number is never within it.
    if abs(claimed - train.loss) <= allowed:
        return Outcome.PASSED, ""
    return (
        Outcome.FAILED,
        f"its worker claimed a loss of {claimed:.3f}, and {train.loss:.3f} ± {allowed:.3f} is measured",
    )


def _agree(ours: Score, theirs: Score) -> bool:
    if ours.sequences != theirs.sequences:
        return False
    pairs = (
        (ours.base_loss, theirs.base_loss),
        (ours.loss, theirs.loss),
        (ours.loss_deviation, theirs.loss_deviation),
        (ours.gain_deviation, theirs.gain_deviation),
    )
    return all(_close(a, b) or (not math.isfinite(a) and not math.isfinite(b)) for a, b in pairs)


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= _AGREE_NATS + _AGREE_SHARE * min(abs(a), abs(b))
