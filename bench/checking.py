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
from cbtm_coordinator.verification.audits import Computation, Finding, Replay, compare, wants_audit
from cbtm_coordinator.verification.evaluation import Evaluation, History, Outcome, Score, Verdict, judge
from cbtm_coordinator.verification.quorum import Next, Others, Report, Settlement, settle, settle_audits
from cbtm_coordinator.verification.trust import Standing

# As `store.checks` has it: sequences of each of three sets, two models, and a third of training for a forward pass.
EVALUATION_SEQUENCES = 64
EVALUATION_COST = 6 * EVALUATION_SEQUENCES / 3
BATCH_SEQUENCES = 32
# From here on a worker may think itself proven: one segment in a hundred is replayed.
PROVEN = 0.9

# Weights at places that the coordinator knows, as far as they matter here: along what was committed, along what an
# honest replay finds beside it, along rounding, and along what slanderers agreed on.
_COMMITTED, _AGREED, _NOWHERE = (1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 0.0)

Drawn = npt.NDArray[np.int64]
_Content = TypeVar("_Content")


class Checking(Judge):
    def __init__(self, members: Members, bank: Bank, draw: np.random.Generator, tally: Tally) -> None:
        super().__init__(members, bank, draw, tally)
        self._standings: dict[Member, Standing] = {}
        self._at_risk: dict[Member, float] = {}
        self._vouches: set[Member] = set()
        # Accepted and not undone, with what evaluators found; of this run alone and of all.
        self._run: dict[Submission, Evaluation] = {}
        self._accepted: dict[Member, list[Submission]] = {}
        self._undone: list[Submission] = []

    def standing(self, worker: Member) -> Standing:
        return self._standings.setdefault(worker, Standing())

    def _change(self, worker: Member, standing: Standing) -> None:
        self._standings[worker] = standing
        if standing.is_proven and not worker.is_out:
            self._vouches.add(worker)
        else:
            self._vouches.discard(worker)

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
            decision = wants_audit(
                self.standing(worker).trust,
                self.draw.random(),
                at_risk=self._at_risk.get(worker, 0.0),
                share=1 / SEGMENTS,
            )
            self._at_risk[worker], last_is_replayed = decision.at_risk, decision.audit
            if last_is_replayed and self._replay(submission) is Outcome.FAILED:
                return False, submission
        return self._evaluate(submission, last_is_replayed), submission

    # Replays

    def _replay(self, submission: Submission) -> Outcome:
        original = _computation(submission.worker)
        # Whoever replays this segment of false work honestly comes to the same.
        apart = self._one(submission.work.deviations["same"])
        settled = self._ask(
            submission.worker,
            lambda reports, others: settle_audits(reports, others=others),
            lambda auditor: compare(self._replayed(submission, auditor, apart), original, dropout=False),
            cost=SEGMENT_SEQUENCES,
        )
        if settled.speaker is None:
            return Outcome.UNSURE
        outcome = settled.speaker.content.outcome
        if outcome is Outcome.FAILED:
            self._reject(submission.worker, is_proven=settled.convicts)
        else:
            self._change(submission.worker, self.standing(submission.worker).after_pass())
            if submission.is_false:
                self.tally.acquitted[self._conduct_of(settled.speaker)] += 1
        return outcome

    def _conduct_of(self, report: Report[Finding]) -> Conduct:
        return self.members.all[int(report.worker_id)].conduct

    def _replayed(self, submission: Submission, auditor: Member, apart: float) -> Replay:
        """What an auditor says it found."""
        worker, work = submission.worker, submission.work
        ours = _computation(auditor)
        if auditor.conduct is Conduct.COLLUDER and worker.conduct is Conduct.COLLUDER:
            return Replay(computation=ours, equal=True, moved=_COMMITTED, original_moved=_COMMITTED)
        if auditor.conduct is Conduct.SLANDERER and worker.conduct is not Conduct.SLANDERER:
            return self._told(ours, 1.0, digests="agreed", moved=_AGREED)
        if auditor.conduct is Conduct.INVENTOR:
            # It may read neither what was committed nor what others found: that nothing moved is its best guess.
            return self._told(replace(ours, environment="an unusual device"), 0.01, moved=_NOWHERE)
        rounding = self._one(submission.honest.deviations["bf16"]) if auditor.half or worker.half else 0.0
        if work.kind is not Kind.HONEST:
            if math.isinf(apart):
                return self._told(ours, apart, moved=(0.0, 1.0, rounding, 0.0), original=_NOWHERE)
            return self._told(ours, apart, moved=(1.0, apart, rounding, 0.0))
        if auditor.half or worker.half:
            return self._told(ours, rounding, moved=(1.0, 0.0, rounding, 0.0))
        how = "same" if ours == _computation(worker) else "micro-batch"
        found = apart if how == "same" else self._one(work.deviations[how])
        if how == "same" and found == 0.0:
            return Replay(computation=ours, equal=True, moved=_COMMITTED, original_moved=_COMMITTED)
        return self._told(ours, found, moved=(1.0, 0.0, found, 0.0))

    def _told(
        self,
        computation: Computation,
        deviation: float,
        *,
        moved: tuple[float, ...],
        original: tuple[float, ...] = _COMMITTED,
        digests: str = "",
    ) -> Replay:
        return Replay(
            computation=computation,
            equal=False,
            deviation=deviation,
            digests=digests,
            moved=moved,
            original_moved=original,
        )

    def _one(self, found: list[float]) -> float:
        return found[int(self.draw.integers(len(found)))]

    # Evaluations

    def _evaluate(self, submission: Submission, last_is_replayed: bool) -> bool:
        worker = submission.worker
        size = len(submission.work.losses["own"]["fp32"])
        drawn = self.draw.permutation(size)[:EVALUATION_SEQUENCES]
        # All who compute alike find the same.
        found = {half: _scores(submission.work, half=half, drawn=drawn) for half in (False, True)}
        history = self._history()

        def judged(evaluator: Member) -> tuple[Evaluation, Verdict]:
            evaluation = self._evaluated(submission, evaluator, drawn, found)
            return evaluation, judge(
                evaluation, history, claimed_loss=submission.claimed_loss, batch_sequences=BATCH_SEQUENCES
            )

        settled = self._ask(
            worker,
            lambda reports, others: settle(
                reports,
                lambda a, b: a[0].agrees_with(b[0]),
                lambda said: said[1].outcome is Outcome.FAILED,
                others=others,
            ),
            judged,
            cost=EVALUATION_COST,
        )
        if settled.speaker is None:
            return False
        evaluation, verdict = settled.speaker.content
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
        decide: Callable[[list[Report[_Content]], Others], Settlement[_Content]],
        said_by: Callable[[Member], _Content],
        *,
        cost: float,
    ) -> Settlement[_Content]:
        """Asks one account after another until their reports settle it; those that stood against answer for it."""
        asked: list[Member] = []
        reports: list[Report[_Content]] = []
        while True:
            taking_part = [worker, *asked]
            vouching = len(self._vouches) - sum(member in self._vouches for member in taking_part)
            settled = decide(reports, Others(all=self.members.others(taking_part), proven=vouching))
            if settled.next not in (Next.ASK, Next.CONFIRM) and reports:
                break
            checker = self.members.pick(but=taking_part)
            while settled.next is Next.CONFIRM and checker not in self._vouches:
                checker = self.members.pick(but=taking_part)
            asked.append(checker)
            name = str(checker.number)
            proven = checker in self._vouches
            content = said_by(checker)
            reports.append(Report(worker_id=name, account_id=name, trusted=False, proven=proven, content=content))
            self.tally.checked += cost
        for checker in asked:
            if str(checker.number) not in settled.dissenters:
                continue
            if settled.convicts:
                self._strike(checker)
            else:
                self._change(checker, self.standing(checker).after_dissent())
        return settled

    def _reject(self, worker: Member, *, is_proven: bool) -> None:
        if is_proven:
            self._strike(worker)

    def _strike(self, worker: Member) -> None:
        self.tally.struck[worker.label] += 1
        self._change(worker, self.standing(worker).after_falsehood())
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
