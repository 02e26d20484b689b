"""A worker's standing: what it earned by work that was checked, and lost by work that was not what it seemed.

Reports are work too: one that a verdict shows to be false costs what false work costs. As BOINC's adaptive
replication has it, a proven worker is checked seldom, and one failure costs all that was earned.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# Each passed audit takes this share of the distance to full trust; after eight, one segment in a hundred is audited.
_STEP = 0.25
# An evaluator or auditor that stood against others, without a verdict, may only be unlucky.
_DISSENT = 0.5
# Five passed audits. Its word counts in a verdict on others.
PROVEN = 0.75
# One failure may be a broken machine; the second shuts it out.
REVOKED_AT = 2


@dataclass(frozen=True, kw_only=True)
class Standing:
    """`trust` from 0, of a new worker, to 1; `strikes` counts work and reports that were shown to be false."""

    trust: float = 0.0
    strikes: int = 0

    @property
    def is_proven(self) -> bool:
        """Whether its word may decide against others."""
        return self.trust >= PROVEN

    @property
    def is_out(self) -> bool:
        """Whether its worker is to be revoked, and all that it did quarantined."""
        return self.strikes >= REVOKED_AT

    def after_pass(self) -> Standing:
        return replace(self, trust=self.trust + _STEP * (1.0 - self.trust))

    def after_dissent(self) -> Standing:
        return replace(self, trust=self.trust * _DISSENT)

    def after_falsehood(self) -> Standing:
        return Standing(trust=0.0, strikes=self.strikes + 1)
