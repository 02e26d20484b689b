"""Clusters, seed fraction and steps for a budget of training tokens, by what was measured nearest to it.

Pure functions. Only protocol B of a study counts, whose dense model was tuned, with the learned router at top-1, which
costs at inference what the dense model does. Between measured numbers of clusters the gain is interpolated in log K,
from none at K = 1; beyond the largest, nothing is said.

What a number of clusters asks for is carried over in units that do not depend on scale: of each expert so many tokens
for each parameter as the smallest share that was still a gain; of each cluster one held-out document to choose by and
one to report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from cbtm_common.recipe import Recipe
from cbtm_coordinator.planning.measurements import Measurement, Published

# Decades between two scales: within a factor of two they are alike, within ten they are near.
_ALIKE, _NEAR = math.log10(2), 1.0
_HELD_OUT_DOCUMENTS = 2
_ENOUGH_SEEDS = 3
# Of an expert, fewer than which leave a learning-rate schedule no room.
_FEW_STEPS = 100


class Confidence(StrEnum):
    # Measured at this scale, over several seeds of randomness.
    HIGH = "high"
    # At this scale with fewer seeds, or within a factor of ten.
    MEDIUM = "medium"
    # Further off: trends, not measurements.
    LOW = "low"


@dataclass(frozen=True, kw_only=True)
class Question:
    """`parameters` of one model. `pretrained`: the experts branch from a model that exists, so there is no seed phase.
    `recipe` says how many tokens a step has."""

    budget_tokens: int
    parameters: int
    documents: int
    corpus_tokens: int
    pretrained: bool
    recipe: Recipe


@dataclass(frozen=True, kw_only=True)
class Advice:
    """`clusters` 1: train one dense model. `steps` are of each expert. `gain`: the share of a tuned dense model's
    perplexity that was saved where it was measured, (least, most) over routing policies; None with one model."""

    clusters: int
    seed_fraction: float
    steps: int
    expert_tokens: int
    epochs: float
    gain: tuple[float, float] | None
    confidence: Confidence
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """One scale at which gains are known: by clusters, (least, most) over routing policies."""

    source: str
    parameters: int
    train_tokens: int | None
    seeds: int
    seed_fraction: float | None
    gains: dict[int, tuple[float, float]]

    def gain(self, clusters: int) -> tuple[float, float]:
        """Interpolated in log2 of `clusters`, which is at most the largest measured."""
        known = [(1, (0.0, 0.0)), *sorted(self.gains.items())]
        for (low, at_low), (high, at_high) in pairwise(known):
            if clusters <= high:
                share = math.log2(clusters / low) / math.log2(high / low)
                return at_low[0] + share * (at_high[0] - at_low[0]), at_low[1] + share * (at_high[1] - at_low[1])
        return known[-1][1]

    def distance(self, question: Question) -> float:
        """Decades to the budget and to the model's size, whichever is more. Unknown tokens count as one decade."""
        size = abs(math.log10(question.parameters / self.parameters))
        if self.train_tokens is None:
            return max(size, _NEAR)
        return max(size, abs(math.log10(question.budget_tokens / self.train_tokens)))


def advise(question: Question, measured: Sequence[Measurement], published: Sequence[Published]) -> Advice:
    """`measured` must tell of a gain somewhere, or there is nothing to advise by."""
    own = _measured_settings(measured)
    settings = [*own, *_published_settings(published)]
    least = min(m.expert_tokens_per_parameter for m in _telling(measured) if m.gain > 0)
    phases = {s.seed_fraction for s in own if s.seed_fraction is not None}
    nearest = min(setting.distance(question) for setting in settings)
    options = [
        (setting.gain(clusters)[0], -clusters, fraction, setting)
        for setting in settings
        if setting.distance(question) == nearest
        for fraction in _fractions(question, setting, phases)
        for clusters in _candidates(min(_room(question, fraction, least), max(setting.gains)), setting.gains)
    ]
    best = max(options, key=lambda option: option[:3], default=None)
    if best is None or best[0] <= 0:
        return _dense(question, min(own, key=lambda setting: setting.distance(question)), least)
    _, clusters, fraction, setting = best
    return _experts(question, -clusters, fraction, setting, phases, least)


def _fractions(question: Question, setting: _Setting, phases: Iterable[float]) -> list[float]:
    """Seed phases to consider: what a setting was measured with, any that was where it does not say."""
    if question.pretrained:
        return [0.0]
    return sorted(phases) if setting.seed_fraction is None else [setting.seed_fraction]


def _telling(measured: Iterable[Measurement]) -> list[Measurement]:
    return [m for m in measured if m.protocol == "B" and m.router == "learned" and m.k == 1]


def _measured_settings(measured: Iterable[Measurement]) -> list[_Setting]:
    groups: dict[tuple[str, float], list[Measurement]] = {}
    for one in _telling(measured):
        groups.setdefault((one.source, one.seed_fraction), []).append(one)
    settings = []
    for (source, fraction), rows in groups.items():
        gains = {c: [m.gain for m in rows if m.clusters == c] for c in {m.clusters for m in rows}}
        settings.append(
            _Setting(
                source=f"this project's study {source!r}",
                parameters=rows[0].parameters,
                train_tokens=rows[0].train_tokens,
                seeds=min(m.seeds for m in rows),
                seed_fraction=fraction,
                gains={c: (min(found), max(found)) for c, found in gains.items()},
            )
        )
    return settings


def _published_settings(published: Iterable[Published]) -> list[_Setting]:
    groups: dict[tuple[str, int], dict[int, tuple[float, float]]] = {}
    for one in published:
        groups.setdefault((one.source, one.parameters), {})[one.clusters] = (one.gain, one.gain)
    return [
        _Setting(source=source, parameters=parameters, train_tokens=None, seeds=1, seed_fraction=None, gains=gains)
        for (source, parameters), gains in groups.items()
    ]


def _room(question: Question, fraction: float, least: float) -> int:
    """The most clusters that budget and corpus have room for."""
    by_budget = question.budget_tokens * (1 - fraction) / (least * question.parameters)
    by_corpus = question.documents * question.recipe.held_out_fraction / _HELD_OUT_DOCUMENTS
    return int(min(by_budget, by_corpus))


def _candidates(most: int, measured: Iterable[int]) -> list[int]:
    powers = [2**n for n in range(1, max(1, most).bit_length())]
    return sorted({c for c in (*powers, *measured) if 2 <= c <= most})


def _experts(
    question: Question, clusters: int, fraction: float, setting: _Setting, phases: Iterable[float], least: float
) -> Advice:
    expert_tokens = int(question.budget_tokens * (1 - fraction) / clusters)
    steps = max(1, round(expert_tokens / question.recipe.step_tokens()))
    gain, confidence = setting.gain(clusters), _confidence(question, setting)
    low, high = (f"{100 * share:.1f}" for share in gain)
    tokens = f"{setting.train_tokens:,} training tokens" if setting.train_tokens else "tokens of its own number"
    reasons = [
        f"nearest to the question is {setting.source}: {setting.parameters:,} parameters, {tokens}",
        f"there {clusters} experts at top-1 {'came' if clusters in setting.gains else 'would come, by interpolation,'} "
        f"{low if low == high else f'{low} to {high}'} % under a dense model of as many tokens"
        + ("" if low == high else ", by how often the context is routed"),
        _bound(question, fraction, least),
    ]
    if fraction:
        tried = ", ".join(f"{100 * phase:g} %" for phase in sorted(phases))
        reasons.append(
            f"a seed phase of {100 * fraction:g} % of the tokens; measured were {tried}. Branch-Train-Merge took about "
            "half (arXiv 2208.03306); the best depends on the data (arXiv 2603.19149)"
        )
    if clusters == max(setting.gains):
        reasons.append("no larger K was measured there; the best K grows with the data (arXiv 2303.14177)")
    warnings = []
    epochs = question.budget_tokens / question.corpus_tokens
    if epochs > 1:
        warnings.append(f"this budget reads the corpus {epochs:.1f} times over")
    if steps < _FEW_STEPS:
        warnings.append(f"{steps} steps are few: a smaller global_batch in the recipe gives more")
    if confidence is Confidence.LOW:
        warnings.append("before the whole budget is spent, compare two or three K at a tenth of it")
    return Advice(
        clusters=clusters,
        seed_fraction=fraction,
        steps=steps,
        expert_tokens=expert_tokens,
        epochs=epochs,
        gain=gain,
        confidence=confidence,
        reasons=(*reasons, _distance(question, setting)),
        warnings=tuple(warnings),
    )


def _dense(question: Question, nearest: _Setting, least: float) -> Advice:
    return Advice(
        clusters=1,
        seed_fraction=0.0,
        steps=max(1, round(question.budget_tokens / question.recipe.step_tokens())),
        expert_tokens=question.budget_tokens,
        epochs=question.budget_tokens / question.corpus_tokens,
        gain=None,
        confidence=_confidence(question, nearest),
        reasons=(
            "one dense model: no number of experts that was found to gain fits this budget and corpus",
            _bound(question, 0.0, least),
            _distance(question, nearest),
        ),
        warnings=(),
    )


def _bound(question: Question, fraction: float, least: float) -> str:
    return (
        f"K is at most {_room(question, fraction, least)} here: an expert gets {least:.2g} tokens for each of its "
        f"parameters, the least that was seen to gain, and a cluster {_HELD_OUT_DOCUMENTS} held-out documents"
    )


def _confidence(question: Question, setting: _Setting) -> Confidence:
    distance = setting.distance(question)
    if question.pretrained or setting.train_tokens is None or distance > _NEAR:
        return Confidence.LOW
    if distance > _ALIKE or setting.seeds < _ENOUGH_SEEDS:
        return Confidence.MEDIUM
    return Confidence.HIGH


def _distance(question: Question, setting: _Setting) -> str:
    """How far what is asked for lies from what was measured."""
    far = f"the model is {_times(question.parameters / setting.parameters)} the one measured"
    if setting.train_tokens is None:
        far += ", its tokens are not compared"
    else:
        far += f", the budget {_times(question.budget_tokens / setting.train_tokens)} that one's"
        far += f"; {setting.seeds} seed(s) of randomness"
    return f"{far}; all was measured from scratch, not from a pretrained model" if question.pretrained else far


def _times(ratio: float) -> str:
    if 0.95 <= ratio <= 1.05:
        return "as large as"
    return f"{ratio:.2g} times" if ratio < 100 else f"{ratio:,.0f} times"
