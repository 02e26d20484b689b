"""What several reports on one checkpoint together say. Strangers raise questions; they do not answer them.

Reports are grouped by whether they agree. Enough that agree and condemn nothing settle it. Where one condemns, or two
disagree, it takes a verdict: three accounts that agree, two of them proven, and a strict majority; or a trusted worker,
who speaks alone. Where nobody else is left to ask, what there is must do, and nobody answers for it
(docs/decisions/0025-whose-word-counts.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from cbtm_coordinator.verification.audits import Finding, cannot_both_be, same_finding
from cbtm_coordinator.verification.evaluation import Outcome

# Two of different accounts agree that a model is good.
REPLICAS = 2
# A verdict: so many agree, and so many of them are proven.
VERDICT = 3
PROVEN_OF_VERDICT = 2
# After so many reports, or checks that failed, without a verdict, asking more tells nothing.
MOST_REPORTS = 7

_Content = TypeVar("_Content")


class Next(StrEnum):
    # `speaker` is what holds.
    SETTLED = "SETTLED"
    # Ask one more account.
    ASK = "ASK"
    # Ask one more, of proven accounts.
    CONFIRM = "CONFIRM"
    # Nobody is left to ask, or asking does not help.
    UNDECIDED = "UNDECIDED"


@dataclass(frozen=True, kw_only=True)
class Report(Generic[_Content]):
    """`proven`: its account's own work stood up to replays (`trust.Standing.is_proven`)."""

    worker_id: str
    account_id: str
    trusted: bool
    proven: bool
    content: _Content


@dataclass(frozen=True, kw_only=True)
class Settlement(Generic[_Content]):
    """`speaker` is set when SETTLED; `dissenters` are the workers whose reports it contradicts."""

    next: Next
    reason: str
    speaker: Report[_Content] | None = None
    dissenters: Sequence[str] = ()
    # Whether it is a verdict, so that somebody may answer: whose work it condemns, and those that stood against it.
    convicts: bool = False


@dataclass(frozen=True, kw_only=True)
class Others:
    """Accounts that could still be asked, and how many of them are proven or trusted."""

    all: int
    proven: int


def settle(
    reports: Sequence[Report[_Content]],
    agree: Callable[[_Content, _Content], bool],
    condemns: Callable[[_Content], bool],
    *,
    others: Others,
    failures: int = 0,
    replicas: int = REPLICAS,
    clashes: Callable[[_Content, _Content], bool] | None = None,
) -> Settlement[_Content]:
    """`failures`: checks that ended without a report; `replicas`: how many settle what nobody questions.

    `clashes`: whether of two reports one must be false; None: where they do not agree.
    """

    def clash(a: _Content, b: _Content) -> bool:
        return clashes(a, b) if clashes is not None else not agree(a, b)

    trusted = next((report for report in reports if report.trusted), None)
    if trusted is not None:
        return _settled(trusted, reports, clash, f"a trusted worker says so ({trusted.worker_id})", convicts=True)
    best: list[Report[_Content]] = []
    for report in reports:
        group = [other for other in reports if agree(report.content, other.content)]
        if len(group) > len(best):
            best = group
    questioned = len(best) < len(reports) or any(condemns(report.content) for report in reports)
    is_majority = 2 * len(best) > len(reports)
    reason = f"{len(best)} of {len(reports)} reports say so"
    if best and not questioned and len(best) >= replicas:
        return _settled(best[0], reports, clash, reason, convicts=False)
    if is_majority and len(best) >= VERDICT:
        proven = sum(report.proven for report in best)
        if proven >= PROVEN_OF_VERDICT:
            return _settled(best[0], reports, clash, f"{reason}, {proven} of proven accounts", convicts=True)
        if others.proven <= 0:
            return _settled(best[0], reports, clash, f"{reason}, and nobody proven is left to ask", convicts=False)
    said = f"{len(reports)} report(s), {len(best)} of which agree"
    if others.all <= 0:
        if is_majority and len(best) >= min(replicas, len(reports)):
            return _settled(best[0], reports, clash, f"{reason}, and nobody is left to ask", convicts=False)
        return Settlement(next=Next.UNDECIDED, reason=f"{said}, and nobody is left to ask")
    if len(reports) + failures >= MOST_REPORTS:
        return Settlement(next=Next.UNDECIDED, reason=f"{said}, after {failures} check(s) that failed")
    return Settlement(next=Next.CONFIRM if questioned and others.proven > 0 else Next.ASK, reason=said)


def _settled(
    speaker: Report[_Content],
    reports: Sequence[Report[_Content]],
    clash: Callable[[_Content, _Content], bool],
    reason: str,
    *,
    convicts: bool,
) -> Settlement[_Content]:
    against = [r.worker_id for r in reports if not r.trusted and clash(speaker.content, r.content)]
    return Settlement(next=Next.SETTLED, reason=reason, speaker=speaker, dissenters=against, convicts=convicts)


def settle_audits(reports: Sequence[Report[Finding]], *, others: Others, failures: int = 0) -> Settlement[Finding]:
    """As `settle`, but the first replay that gets the same weights acquits; one that cannot tell is as none."""
    told = [report for report in reports if report.content.outcome is not Outcome.UNSURE]
    return settle(
        told,
        same_finding,
        lambda finding: finding.outcome is Outcome.FAILED,
        others=others,
        failures=failures + len(reports) - len(told),
        replicas=1,
        clashes=cannot_both_be,
    )
