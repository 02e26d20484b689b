"""What several reports on one checkpoint together say. One report convicts nobody, unless its author is trusted.

Reports are grouped by whether they agree. The largest group that is a strict majority, and has two members, speaks; a
trusted worker's report speaks alone. Where nobody else is left to ask, what there is must do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

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
        return _settled(trusted, reports, agree, f"a trusted worker says so ({trusted.worker_id})")
    best: list[Report[_Content]] = []
    for report in reports:
        group = [other for other in reports if agree(report.content, other.content)]
        if len(group) > len(best):
            best = group
    needed = min(replicas, len(reports)) if others <= 0 else replicas
    if best and len(best) >= needed and 2 * len(best) > len(reports):
        return _settled(best[0], reports, agree, f"{len(best)} of {len(reports)} reports say so")
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
) -> Settlement[_Content]:
    against = [r.worker_id for r in reports if not r.trusted and not agree(speaker.content, r.content)]
    return Settlement(next=Next.SETTLED, reason=reason, speaker=speaker, dissenters=against)
