"""The rival: a task is computed twice and accepted when two results are equal, as BOINC's adaptive replication does.

Constants are those of BOINC's scheduler and validator (`CONS_VALID_UNREPLICATED`, `set_trust`, `is_valid`): a host is
believed alone from ten consecutive valid results on, but for one time in as many as it has; only replicated results
count, and one that is invalid sets it back to none. Generous to it: honest results always compare as equal, whatever
the devices; BOINC has homogeneous redundancy, or a comparison with a tolerance, for what it can of that.

Equal are, beside honest results, two of the same wrong way that leaves no choice: the seed, the same few steps, the
same half. Noise and other data are everybody's own. BOINC shuts nobody out for wrong results.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bench.community import TASK_SEQUENCES, Bank, Judge, Member, Members, Submission, Tally
from bench.works import Kind

UNREPLICATED = 10
QUORUM = 2
# After so many results without two that are equal, the work unit is given up, and made anew.
MOST_RESULTS = 10


class Redundancy(Judge):
    def __init__(self, members: Members, bank: Bank, draw: np.random.Generator, tally: Tally) -> None:
        super().__init__(members, bank, draw, tally)
        self._consecutive: dict[Member, int] = {}

    def is_proven(self, worker: Member) -> bool:
        return self._consecutive.get(worker, 0) >= UNREPLICATED

    def accepts(self, submission: Submission) -> tuple[bool, Submission]:
        worker = submission.worker
        self.tally.trained += TASK_SEQUENCES
        valid = self._consecutive.get(worker, 0)
        if valid >= UNREPLICATED and self.draw.random() > 1 / valid:
            return True, submission
        results = [submission]
        while len(results) < MOST_RESULTS:
            results.append(self._another(submission, results))
            for result in results:
                equal = [other for other in results if _equal(result, other)]
                if len(equal) >= QUORUM:
                    for other in results:
                        is_valid = other in equal
                        self._consecutive[other.worker] = self._consecutive.get(other.worker, 0) + 1 if is_valid else 0
                    return submission in equal, equal[0]
        for result in results:
            self._consecutive[result.worker] = 0
        return False, submission

    def _another(self, submission: Submission, results: list[Submission]) -> Submission:
        worker = self.members.pick(but=[result.worker for result in results])
        self.tally.checked += TASK_SEQUENCES
        cheats = not worker.waits or self.is_proven(worker)
        task = (submission.honest.cluster, submission.honest.order)
        work = self.bank.of(task, worker.kind) if cheats else submission.honest
        return replace(submission, worker=worker, work=work)


def _equal(a: Submission, b: Submission) -> bool:
    if a is b:
        return True
    return a.work.kind is b.work.kind and a.work.kind not in (Kind.NOISE, Kind.OTHER_DATA)
