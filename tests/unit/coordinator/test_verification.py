"""What is believed of work handed in: evaluations, quorums, audits, standing."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from cbtm_coordinator.verification.audits import (
    LEAST_RATE,
    AuditDecision,
    Computation,
    Finding,
    Replay,
    audit_rate,
    cannot_both_be,
    compare,
    same_finding,
    wants_audit,
)
from cbtm_coordinator.verification.evaluation import Evaluation, History, Outcome, Score, Verdict, judge
from cbtm_coordinator.verification.quorum import MOST_REPORTS, Next, Others, Report, Settlement, settle
from cbtm_coordinator.verification.trust import Standing

CPU = Computation(device_type="cpu", environment="cpu AVX2, 2 threads, torch 2.11.0", precision="fp32", micro_batch=8)
H100 = Computation(device_type="cuda", environment="H100, torch 2.11.0", precision="bf16", micro_batch=32)
# What eight honest experts of one run gained, and by how much their canary rose.
KNOWN = History(gains=[0.12, 0.18, 0.2, 0.28, 0.1, 0.15, 0.25, 0.22], canary_rises=[0.1, 0.2, 0.15, 0.3])


def _score(gain: float, *, base: float = 4.0, deviation: float = 0.1, sequences: int = 64) -> Score:
    return Score(sequences=sequences, base_loss=base, loss=base - gain, loss_deviation=0.4, gain_deviation=deviation)


def _evaluation(gain: float, *, canary: float | None = -0.2, deviation: float = 0.1) -> Evaluation:
    return Evaluation(
        own=_score(gain, deviation=deviation),
        train=_score(gain + 0.05),
        canary=None if canary is None else _score(canary),
    )


def _judged(evaluation: Evaluation, *, history: History = KNOWN, claimed: float | None = None) -> Verdict:
    claimed = evaluation.train.loss + 0.1 if claimed is None else claimed
    return judge(evaluation, history, claimed_loss=claimed, batch_sequences=32)


@pytest.mark.parametrize("history", [History(), KNOWN])
def test_an_expert_that_learned_its_cluster_passes(history: History) -> None:
    assert _judged(_evaluation(0.15), history=history).outcome is Outcome.PASSED


@pytest.mark.parametrize("history", [History(), KNOWN])
def test_a_seed_handed_back_fails_from_the_first_expert_on(history: History) -> None:
    verdict = _judged(_evaluation(0.0, canary=0.0, deviation=0.0), history=history)
    assert verdict.outcome is Outcome.FAILED
    assert "gains 0.0000" in verdict.reason


def test_weights_with_noise_fail() -> None:
    assert _judged(_evaluation(-0.3, canary=-0.3)).outcome is Outcome.FAILED


def test_a_gain_far_under_what_others_gained_fails_once_it_is_known_what_is_usual() -> None:
    little = _evaluation(0.004, deviation=0.005)
    assert _judged(little, history=History()).outcome is Outcome.PASSED
    assert _judged(little).outcome is Outcome.FAILED


def test_a_gain_within_the_noise_is_left_to_an_audit() -> None:
    assert _judged(_evaluation(0.03, deviation=0.3)).outcome is Outcome.UNSURE


def test_a_canary_that_collapses_fails_once_it_is_known_how_far_experts_drift() -> None:
    collapsed = _evaluation(0.2, canary=-3.0)
    assert _judged(collapsed, history=History()).outcome is Outcome.UNSURE
    assert _judged(collapsed).outcome is Outcome.FAILED


@pytest.mark.parametrize("claimed", [0.0, 2.0, 9.0, math.nan])
def test_a_claimed_loss_that_is_a_lie_fails(claimed: float) -> None:
    verdict = _judged(_evaluation(0.2), claimed=claimed)
    assert verdict.outcome is Outcome.FAILED
    assert "claimed" in verdict.reason


def test_a_worker_that_claims_nothing_is_left_to_an_audit() -> None:
    verdict = judge(_evaluation(0.2), KNOWN, claimed_loss=None, batch_sequences=32)
    assert verdict.outcome is Outcome.UNSURE


def test_a_loss_that_is_no_number_fails() -> None:
    assert _judged(_evaluation(math.nan), claimed=4.0).outcome is Outcome.FAILED


def test_honest_experts_of_unlike_clusters_never_fail() -> None:
    """Gains spread by a factor of about 10 between the clusters of a run, and measured on 64 sequences each."""
    draw = random.Random(5)
    for _ in range(2_000):
        gain = 0.15 * math.exp(draw.gauss(0, 0.4))
        noise = draw.gauss(0, 0.1 / 8)
        evaluation = _evaluation(gain + noise, canary=-abs(draw.gauss(0.3, 0.2)))
        claimed = evaluation.train.loss * 1.03 + draw.gauss(0, 0.4 * math.sqrt(1 / 32 + 1 / 64))
        assert _judged(evaluation, claimed=claimed).outcome is not Outcome.FAILED


# Quorum: contents are numbers that agree when they are equal; negative ones condemn.


def _settled(
    *contents: int,
    others: int = 3,
    proven: str = "",
    proven_others: int = 0,
    trusted: int | None = None,
    failures: int = 0,
) -> Settlement[int]:
    """`proven`: the places of reports by proven accounts."""
    reports = [
        Report(worker_id=f"w{i}", account_id=f"a{i}", trusted=i == trusted, proven=str(i) in proven, content=content)
        for i, content in enumerate(contents)
    ]
    left = Others(all=others, proven=proven_others)
    return settle(reports, int.__eq__, lambda content: content < 0, others=left, failures=failures)


def test_one_report_is_not_enough_while_others_can_be_asked() -> None:
    assert _settled(1).next is Next.ASK
    assert _settled(1, others=0).next is Next.SETTLED
    assert _settled(others=0).next is Next.UNDECIDED


def test_two_that_praise_alike_settle_it() -> None:
    settled = _settled(1, 1)
    assert (settled.next, settled.dissenters, settled.convicts) == (Next.SETTLED, [], False)


def test_two_strangers_that_condemn_only_raise_a_question_for_the_proven() -> None:
    assert _settled(-1, -1, proven_others=1).next is Next.CONFIRM
    assert _settled(-1, -1, -1, proven_others=1).next is Next.CONFIRM
    assert _settled(-1, -1, -1, proven="0", proven_others=1).next is Next.CONFIRM
    verdict = _settled(-1, -1, -1, proven="02", proven_others=1)
    assert (verdict.next, verdict.convicts) == (Next.SETTLED, True)


def test_where_nobody_proven_is_there_three_newcomers_reject_and_convict_nobody() -> None:
    assert _settled(-1, -1).next is Next.ASK
    settled = _settled(-1, -1, -1)
    assert (settled.next, settled.convicts) == (Next.SETTLED, False)
    few = _settled(-1, -1, others=0)
    assert (few.next, few.convicts) == (Next.SETTLED, False)


def test_slanderers_that_did_not_agree_beforehand_convict_nobody_and_one_honest_verdict_names_them_all() -> None:
    assert _settled(-1, -2, proven="01", proven_others=3).next is Next.CONFIRM
    assert _settled(-1, -2, 1, 1, proven="0123", proven_others=3).next is Next.CONFIRM
    settled = _settled(-1, -2, 1, 1, 1, proven="01234", proven_others=3)
    assert (settled.dissenters, settled.convicts) == (["w0", "w1"], True)
    settled = _settled(-1, 1, 1, 1, proven="0123", proven_others=3)
    assert settled.speaker is not None
    assert (settled.speaker.content, settled.dissenters, settled.convicts) == (1, ["w0"], True)


def test_a_trusted_worker_speaks_alone_and_against_any_number() -> None:
    assert _settled(1, trusted=0).next is Next.SETTLED
    settled = _settled(-1, -1, -1, 2, trusted=3, proven="012")
    assert settled.speaker is not None
    assert (settled.speaker.content, settled.dissenters, settled.convicts) == (2, ["w0", "w1", "w2"], True)


def test_without_a_majority_it_ends_undecided() -> None:
    assert _settled(1, 2, others=0).next is Next.UNDECIDED
    assert _settled(1, 2, 3, 4).next is Next.ASK
    assert _settled(1, 1, 2, 2).next is Next.ASK
    assert _settled(*range(MOST_REPORTS)).next is Next.UNDECIDED
    assert _settled(1, failures=MOST_REPORTS - 1).next is Next.UNDECIDED


def test_evaluations_agree_up_to_rounding_and_on_what_is_no_number() -> None:
    assert _evaluation(0.2).agrees_with(_evaluation(0.205))
    assert not _evaluation(0.2).agrees_with(_evaluation(0.3))
    assert not _evaluation(0.2).agrees_with(_evaluation(0.2, canary=None))
    assert _evaluation(math.nan).agrees_with(_evaluation(math.inf))
    assert not _evaluation(math.nan).agrees_with(_evaluation(0.2))


# Audits


def test_a_replay_with_the_same_bits_passes_whatever_computed_it() -> None:
    assert compare(Replay(computation=H100, equal=True), CPU, dropout=True).outcome is Outcome.PASSED


def test_the_same_computation_on_a_cpu_must_give_the_same_bits() -> None:
    assert compare(Replay(computation=CPU, equal=False, deviation=1e-6), CPU, dropout=False).outcome is Outcome.FAILED


@pytest.mark.parametrize(
    ("original", "deviation", "outcome"),
    [
        (CPU, 0.02, Outcome.PASSED),
        (CPU, 0.1, Outcome.FAILED),
        (H100, 0.1, Outcome.PASSED),
        (H100, 0.5, Outcome.FAILED),
        (H100, 1.0, Outcome.FAILED),
        (H100, math.nan, Outcome.FAILED),
        (H100, None, Outcome.FAILED),
    ],
)
def test_elsewhere_a_replay_must_come_near(original: Computation, deviation: float | None, outcome: Outcome) -> None:
    other_cpu = Computation(device_type="cpu", environment="cpu AVX512", precision="fp32", micro_batch=8)
    assert compare(
        Replay(computation=other_cpu, equal=False, deviation=deviation), original, dropout=False
    ).outcome is (outcome)


def test_dropout_drawn_by_another_device_cannot_be_compared() -> None:
    assert compare(Replay(computation=CPU, equal=False, deviation=0.9), H100, dropout=True).outcome is Outcome.UNSURE


# Of a segment: weights at three places, and where they came to.
COMMITTED, REPLAYED = (1.0, 0.0, 0.0), (0.3, 0.8, 0.0)


def _found(
    moved: tuple[float, ...] | None, *, deviation: float = 1.0, equal: bool = False, digests: str = ""
) -> Finding:
    replay = Replay(
        computation=H100,
        equal=equal,
        deviation=deviation,
        digests=digests,
        moved=moved,
        original_moved=COMMITTED,
    )
    return compare(replay, CPU, dropout=False)


def test_an_invented_replay_does_not_acquit_whatever_it_says_of_its_deviation() -> None:
    assert _found(COMMITTED, deviation=0.01).outcome is Outcome.PASSED
    # It trained nothing, left out places, or told what is no number.
    for moved in ((0.0, 0.0, 0.0), (), (math.nan, 0.0, 0.0)):
        assert _found(moved, deviation=0.01).outcome is Outcome.FAILED
    assert _found(None, deviation=0.01).outcome is Outcome.UNSURE


def test_auditors_condemn_alike_only_when_they_came_to_the_same_weights() -> None:
    near = tuple(x + 0.01 for x in REPLAYED)
    assert same_finding(_found(REPLAYED), _found(near))
    assert same_finding(_found(REPLAYED, digests="d"), _found((0.0, 0.0, 9.0), digests="d"))
    invented = _found((0.0, 0.0, 1.0))
    assert not same_finding(_found(REPLAYED), invented)
    assert cannot_both_be(_found(REPLAYED), invented)


def test_auditors_that_came_to_the_same_weights_contradict_each_other_in_nothing() -> None:
    strict = replace(_found(COMMITTED, deviation=0.01), outcome=Outcome.FAILED)
    assert not cannot_both_be(strict, _found(COMMITTED, deviation=0.01))
    assert cannot_both_be(_found(REPLAYED), _found(COMMITTED, equal=True))


def _audit(trust: float, draw: float, *, at_risk: float = 0.0, share: float = 0.05) -> AuditDecision:
    return wants_audit(trust, draw, at_risk=at_risk, share=share)


def _segments_to_the_next_audit(draw: random.Random, *, before: int) -> int:
    """Of a proven worker that began to cheat after `before` segments."""
    at_risk, count = 0.0, 0
    while True:
        decision = _audit(1.0, draw.random(), at_risk=at_risk)
        count += 1
        if decision.audit and count > before:
            return count - before
        at_risk = decision.at_risk


def test_a_proven_worker_that_begins_to_cheat_is_found_sooner_than_by_chance_and_for_certain() -> None:
    draw = random.Random(1)
    found = [_segments_to_the_next_audit(draw, before=draw.randrange(100, 400)) for _ in range(800)]
    # Independent draws of one in a hundred: 100 on average, without end.
    assert 60 <= sum(found) / len(found) <= 74
    assert max(found) <= 201


def test_replays_of_a_proven_worker_cost_one_in_a_hundred_however_often_it_commits() -> None:
    draw = random.Random(2)
    for share, segments in ((0.05, 1.0), (0.01, 0.2), (1.0, 2.0)):
        at_risk, audits = 0.0, 0
        for _ in range(40_000):
            decision = _audit(1.0, draw.random(), at_risk=at_risk, share=share)
            at_risk, audits = decision.at_risk, audits + decision.audit
        assert audits / 40_000 == pytest.approx(LEAST_RATE * segments, rel=0.1)


def test_a_new_worker_is_audited_always_and_a_proven_one_seldom() -> None:
    standing = Standing()
    assert _audit(standing.trust, 0.999).audit
    assert _audit(standing.trust, 0.999, share=0.001).audit
    for _ in range(8):
        standing = standing.after_pass()
    assert audit_rate(standing.trust) == pytest.approx(LEAST_RATE, rel=0.1)
    assert audit_rate(standing.after_falsehood().trust) == 1.0


def test_falsehood_shown_twice_shuts_a_worker_out() -> None:
    once = Standing(trust=0.9).after_falsehood()
    assert not once.is_out
    assert once.after_pass().after_falsehood().is_out
    assert not Standing(trust=0.5).after_dissent().is_out
