"""What several reports on one checkpoint together say. One report convicts nobody, unless its author is trusted.

Reports are grouped by whether they agree. The largest group that is a strict majority, and has two members, speaks; a
trusted worker's report speaks alone. Where nobody else is left to ask, what there is must do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from cbtm_coordinator.verification.evaluation import Outcome, Verdict

# Two of different accounts agree; a third is called when they do not.
REPLICAS = 2
# After so many reports, or checks that failed, of which no two agree, asking more tells nothing.
MOST_REPORTS = 5

_Content = TypeVar("_Content")


class Next(StrEnum):
    # `speaker` is what holds.
    SETTLED = "SETTLED"
    # Ask one more account.
    ASK = "ASK"
    # Nobody is left to ask, or asking does not help.
    UNDECIDED = "UNDECIDED"


@dataclass(frozen=True, kw_only=True)
class Report(Generic[_Content]):
    worker_id: str
    account_id: str
    trusted: bool
    content: _Content


@dataclass(frozen=True, kw_only=True)
class Settlement(Generic[_Content]):
    """`speaker` is set when SETTLED; `dissenters` are the workers whose reports it contradicts."""

    next: Next
    reason: str
    speaker: Report[_Content] | None = None
    dissenters: Sequence[str] = ()
    # Whether it is more than one unknown account's word, so that somebody may answer for what it says.
    convicts: bool = False


def settle(
    reports: Sequence[Report[_Content]],
    agree: Callable[[_Content, _Content], bool],
    *,
    others: int,
    failures: int = 0,
    replicas: int = REPLICAS,
) -> Settlement[_Content]:
    """`others`: accounts that could still be asked; `failures`: checks that ended without a report."""
    trusted = next((report for report in reports if report.trusted), None)
    if trusted is not None:
        return _settled(trusted, reports, agree, f"a trusted worker says so ({trusted.worker_id})", convicts=True)
    best: list[Report[_Content]] = []
    for report in reports:
        group = [other for other in reports if agree(report.content, other.content)]
        if len(group) > len(best):
            best = group
    needed = min(replicas, len(reports)) if others <= 0 else replicas
    if best and len(best) >= needed and 2 * len(best) > len(reports):
        reason = f"{len(best)} of {len(reports)} reports say so"
        return _settled(best[0], reports, agree, reason, convicts=len(best) >= REPLICAS)
    said = f"{len(reports)} report(s), {len(best)} of which agree"
    if others <= 0:
        return Settlement(next=Next.UNDECIDED, reason=f"{said}, and nobody is left to ask")
    if len(reports) + failures >= MOST_REPORTS:
        return Settlement(next=Next.UNDECIDED, reason=f"{said}, after {failures} check(s) that failed")
    return Settlement(next=Next.ASK, reason=said)


def _settled(
    speaker: Report[_Content],
    reports: Sequence[Report[_Content]],
    agree: Callable[[_Content, _Content], bool],
    reason: str,
    *,
    convicts: bool,
) -> Settlement[_Content]:
    against = [r.worker_id for r in reports if not r.trusted and not agree(speaker.content, r.content)]
    return Settlement(next=Next.SETTLED, reason=reason, speaker=speaker, dissenters=against, convicts=convicts)


def settle_audits(reports: Sequence[Report[Verdict]], *, others: int, failures: int = 0) -> Settlement[Verdict]:
    """As `settle`, but the first replay that gets the same weights acquits; one that cannot tell is as none."""
    told = [report for report in reports if report.content.outcome is not Outcome.UNSURE]
    acquitted = len(told) == 1 and told[0].content.outcome is Outcome.PASSED
    return settle(
        told,
        lambda a, b: a.outcome is b.outcome,
        others=others,
        failures=failures + len(reports) - len(told),
        replicas=1 if acquitted else REPLICAS,
    )
