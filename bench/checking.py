"""The coordinator's way: replays and evaluations by other accounts, decided by `cbtm_coordinator.verification`.

What is done with those decisions follows `cbtm_coordinator.store.acceptance`, with everything in memory: a check is
done at once, by a worker drawn at random among the accounts that may.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from bench.community import (
    SEGMENT_SEQUENCES,
    SEGMENTS,
    Bank,
    Conduct,
    Judge,
    Member,
    Members,
    Submission,
    Tally,
)
from bench.works import Kind, Work
from cbtm_coordinator.verification.audits import Computation, Replay, compare, wants_audit
from cbtm_coordinator.verification.evaluation import Evaluation, History, Outcome, Score, Verdict, judge
from cbtm_coordinator.verification.quorum import Next, Report, Settlement, settle, settle_audits
from cbtm_coordinator.verification.trust import Standing

# As `store.checks` has it: sequences of each of three sets, two models, and a third of training for a forward pass.
EVALUATION_SEQUENCES = 64
EVALUATION_COST = 6 * EVALUATION_SEQUENCES / 3
BATCH_SEQUENCES = 32
# From here on a worker may think itself proven: one segment in a hundred is replayed.
PROVEN = 0.9

Drawn = npt.NDArray[np.int64]
_Content = TypeVar("_Content")


class Checking(Judge):
    def __init__(self, members: Members, bank: Bank, draw: np.random.Generator, tally: Tally) -> None:
        super().__init__(members, bank, draw, tally)
        self._standings: dict[Member, Standing] = {}
        # Accepted and not undone, with what evaluators found; of this run alone and of all.
        self._run: dict[Submission, Evaluation] = {}
        self._accepted: dict[Member, list[Submission]] = {}
        self._undone: list[Submission] = []

    def standing(self, worker: Member) -> Standing:
        return self._standings.setdefault(worker, Standing())

    def is_proven(self, worker: Member) -> bool:
        return self.standing(worker).trust >= PROVEN

    def begin_run(self) -> None:
        self._run = {}

    def collect_undone(self) -> list[Submission]:
        undone, self._undone = self._undone, []
        return undone

    def accepts(self, submission: Submission) -> tuple[bool, Submission]:
        worker = submission.worker
        last_is_replayed = False
        for _ in range(SEGMENTS):
            self.tally.trained += SEGMENT_SEQUENCES
            last_is_replayed = wants_audit(self.standing(worker).trust, self.draw.random()).audit
            if last_is_replayed and self._replay(submission) is Outcome.FAILED:
                return False, submission
        return self._evaluate(submission, last_is_replayed), submission

    # Replays

    def _replay(self, submission: Submission) -> Outcome:
        original = _computation(submission.worker)
        settled = self._ask(
            submission.worker,
            lambda reports, others: settle_audits(reports, others=others),
            lambda auditor: compare(self._replayed(submission, auditor), original, dropout=False),
            cost=SEGMENT_SEQUENCES,
        )
        if settled.speaker is None:
            return Outcome.UNSURE
        outcome = settled.speaker.content.outcome
        if outcome is Outcome.FAILED:
            self._reject(submission.worker, is_proven=settled.convicts)
        else:
            self._standings[submission.worker] = self.standing(submission.worker).after_pass()
            if submission.is_false:
                self.tally.acquitted[self._conduct_of(settled.speaker)] += 1
        return outcome

    def _conduct_of(self, report: Report[Verdict]) -> Conduct:
        return self.members.all[int(report.worker_id)].conduct

    def _replayed(self, submission: Submission, auditor: Member) -> Replay:
        """What an auditor says it found."""
        worker, work = submission.worker, submission.work
        ours = _computation(auditor)
        if auditor.conduct is Conduct.COLLUDER and worker.conduct is Conduct.COLLUDER:
            return Replay(computation=ours, equal=True)
        if auditor.conduct is Conduct.SLANDERER and worker.conduct is not Conduct.SLANDERER:
            return Replay(computation=ours, equal=False, deviation=1.0)
        if auditor.conduct is Conduct.INVENTOR:
            return Replay(computation=replace(ours, environment="an unusual device"), equal=False, deviation=0.01)
        if work.kind is not Kind.HONEST:
            return Replay(computation=ours, equal=False, deviation=self._one(work.deviations["same"]))
        if auditor.half or worker.half:
            return Replay(computation=ours, equal=False, deviation=self._one(work.deviations["bf16"]))
        if ours != _computation(worker):
            return Replay(computation=ours, equal=False, deviation=self._one(work.deviations["micro-batch"]))
        found = self._one(work.deviations["same"])
        return Replay(computation=ours, equal=found == 0.0, deviation=found)

    def _one(self, found: list[float]) -> float:
        return found[int(self.draw.integers(len(found)))]

    # Evaluations

    def _evaluate(self, submission: Submission, last_is_replayed: bool) -> bool:
        worker = submission.worker
        size = len(submission.work.losses["own"]["fp32"])
        drawn = self.draw.permutation(size)[:EVALUATION_SEQUENCES]
        # All who compute alike find the same.
        found = {half: _scores(submission.work, half=half, drawn=drawn) for half in (False, True)}
        settled = self._ask(
            worker,
            lambda reports, others: settle(reports, lambda a, b: a.agrees_with(b), others=others),
            lambda evaluator: self._evaluated(submission, evaluator, drawn, found),
            cost=EVALUATION_COST,
        )
        if settled.speaker is None:
            return False
        evaluation = settled.speaker.content
        verdict = judge(
            evaluation, self._history(), claimed_loss=submission.claimed_loss, batch_sequences=BATCH_SEQUENCES
        )
        if verdict.outcome is Outcome.FAILED:
            self._reject(worker, is_proven=settled.convicts)
            return False
        unsure = verdict.outcome is Outcome.UNSURE and not last_is_replayed
        if unsure and self._replay(submission) is Outcome.FAILED:
            return False
        self._run[submission] = evaluation
        self._accepted.setdefault(worker, []).append(submission)
        return True

    def _evaluated(
        self, submission: Submission, evaluator: Member, drawn: Drawn, found: Mapping[bool, Evaluation]
    ) -> Evaluation:
        """What an evaluator says it measured."""
        worker = submission.worker
        if evaluator.conduct is Conduct.COLLUDER and worker.conduct is Conduct.COLLUDER:
            return _scores(submission.honest, half=False, drawn=drawn)
        honest = found[evaluator.half]
        if evaluator.conduct is Conduct.SLANDERER and worker.conduct is not Conduct.SLANDERER:
            return replace(honest, own=replace(honest.own, loss=round(honest.own.base_loss, 1) + 1.0))
        if evaluator.conduct is Conduct.INVENTOR:
            # It knows what the scores of others were like, not those of this.
            other = self.bank.of(self.bank.tasks[int(self.draw.integers(len(self.bank.tasks)))], Kind.HONEST)
            return _scores(other, half=evaluator.half, drawn=self.draw.permutation(drawn))
        return honest

    def _history(self) -> History:
        known = list(self._run.values())
        return History(
            gains=[e.own.gain for e in known], canary_rises=[-e.canary.gain for e in known if e.canary is not None]
        )

    # What follows

    def _ask(
        self,
        worker: Member,
        decide: Callable[[list[Report[_Content]], int], Settlement[_Content]],
        said_by: Callable[[Member], _Content],
        *,
        cost: float,
    ) -> Settlement[_Content]:
        """Asks one account after another until their reports settle it; those that stood against lose trust."""
        asked: list[Member] = []
        reports: list[Report[_Content]] = []
        while True:
            settled = decide(reports, self.members.others([worker, *asked]))
            if settled.next is not Next.ASK and reports:
                break
            checker = self.members.pick(but=[worker, *asked])
            asked.append(checker)
            name = str(checker.number)
            reports.append(Report(worker_id=name, account_id=name, trusted=False, content=said_by(checker)))
            self.tally.checked += cost
        for checker in asked:
            if str(checker.number) in settled.dissenters:
                self._standings[checker] = self.standing(checker).after_dissent()
        return settled

    def _reject(self, worker: Member, *, is_proven: bool) -> None:
        if not is_proven:
            return
        self._standings[worker] = self.standing(worker).after_false_work()
        if not self.standing(worker).is_out:
            return
        self.members.shut_out(worker)
        undone = self._accepted.pop(worker, [])
        for submission in undone:
            self._run.pop(submission, None)
        self._undone += undone


def _computation(worker: Member) -> Computation:
    return Computation(
        device_type="cuda" if worker.half else "cpu",
        environment=worker.environment,
        precision="bf16" if worker.half else "fp32",
        micro_batch=8,
        threads=0 if worker.half else 1,
    )


def _scores(work: Work, *, half: bool, drawn: Drawn) -> Evaluation:
    precision = "bf16" if half else "fp32"
    scores = {}
    for name in ("own", "train", "canary"):
        before, after = (losses[name][precision][drawn].astype(float) for losses in (work.base_losses, work.losses))
        scores[name] = Score(
            sequences=len(drawn),
            base_loss=float(before.mean()),
            loss=float(after.mean()),
            loss_deviation=float(after.std()),
            gain_deviation=float((before - after).std()),
        )
    return Evaluation(**scores)


def evaluations_alone(works: list[Work], draw: np.random.Generator, *, times: int) -> dict[Kind, dict[Outcome, float]]:
    """Shares of verdicts on each kind of work by evaluation alone, once a run has accepted eight experts."""
    honest = [w for w in works if w.kind is Kind.HONEST]
    shares: dict[Kind, dict[Outcome, float]] = {}
    for kind in Kind:
        counts = dict.fromkeys(Outcome, 0)
        mine = [w for w in works if w.kind is kind]
        for number in range(times):
            work = mine[number % len(mine)]
            size = len(work.losses["own"]["fp32"])
            known = [
                _scores(w, half=False, drawn=draw.permutation(size)[:EVALUATION_SEQUENCES])
                for w in (honest[int(i)] for i in draw.integers(len(honest), size=8))
            ]
            history = History(
                gains=[e.own.gain for e in known], canary_rises=[-e.canary.gain for e in known if e.canary is not None]
            )
            (trained,) = [w for w in honest if (w.cluster, w.order) == (work.cluster, work.order)]
            claimed = trained.loss if kind in (Kind.FEW_STEPS, Kind.HONEST) else work.loss
            if kind in (Kind.SEED_RETURNED, Kind.NOISE, Kind.OTHER_DATA):
                claimed = float(work.losses["train"]["fp32"].mean())
            found = judge(
                _scores(work, half=False, drawn=draw.permutation(size)[:EVALUATION_SEQUENCES]),
                history,
                claimed_loss=claimed,
                batch_sequences=BATCH_SEQUENCES,
            )
            counts[found.outcome] += 1
        shares[kind] = {outcome: count / times for outcome, count in counts.items()}
    assert all(math.isclose(sum(of_kind.values()), 1.0) for of_kind in shares.values())
    return shares
