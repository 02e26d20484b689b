"""How well a community of strangers is kept honest: what is caught, how soon, and what checking costs.

    python -m bench.verification [--quick] [--tasks N] [--out FILE]

A community of 1,000 workers, each of an account of its own, works on runs of `bench.community.RUN_TASKS` experts with
none, a tenth and three tenths of it dishonest, in equal parts of every way in `bench.community.groups`. What is handed
in is judged by the coordinator's own decisions (`bench.checking`) and, in a community drawn alike, by BOINC's adaptive
replication (`bench.redundancy`). What the work of each kind scores and how its replays come out was measured on experts
that `bench.works` trained. `--out` writes the tables in Markdown.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.checking import Checking, evaluations_alone
from bench.community import Bank, Judge, Tally, community, groups, live
from bench.redundancy import Redundancy
from bench.report import Report
from bench.works import Kind, Work, load
from cbtm_coordinator.verification.evaluation import Outcome

MEMBERS = 1_000
DISHONEST = (0.0, 0.1, 0.3)
# Of each community; a worker has proven itself after about seven, and the last third is the steady state.
TASKS, QUICK_TASKS = 24_000, 9_000
STEADY = 2 / 3
EVALUATIONS = 4_000


@dataclass(frozen=True, kw_only=True)
class Lived:
    dishonest: float
    way: str
    tally: Tally


def measure(works: Sequence[Work], dishonest: float, judge: type[Judge], *, tasks: int, seed: int) -> Lived:
    draw = np.random.default_rng(seed)
    members = community(MEMBERS, dishonest, draw)
    tally = Tally()
    live(judge(members, Bank(works), draw, tally), tasks=tasks)
    return Lived(dishonest=dishonest, way="cbtm" if judge is Checking else "BOINC", tally=tally)


def caught(tally: Tally, label: str) -> float:
    """Share of false work that was not accepted."""
    return tally.caught[label] / tally.false[label] if tally.false[label] else math.nan


def standing(tally: Tally, label: str) -> float:
    """Share of false work that is part of an ensemble at the end."""
    left = tally.false[label] - tally.caught[label] - tally.undone[label]
    return left / tally.false[label] if tally.false[label] else math.nan


def labels() -> list[str]:
    from bench.community import Member

    return [
        Member(number=0, conduct=c, kind=k, waits=w, half=False, environment="", person=0).label for c, k, w in groups()
    ]


def add(report: Report, lived: Lived) -> None:
    tally, who = lived.tally, f"{lived.way}, {lived.dishonest:.0%} dishonest"
    ours = lived.way == "cbtm"
    rejected = 10_000 * tally.honest_rejected / tally.honest
    clean = lived.dishonest == 0
    report.add(
        f"{who}: honest work rejected", rejected, "of 10,000", bar=0.0 if ours and clean else None, sense="at most"
    )
    report.add(
        f"{who}: checks, of training, steady",
        100 * tally.overhead(STEADY),
        "%",
        bar=2.0 if ours and clean else None,
        sense="at most",
    )
    report.add(f"{who}: checks, of training, all", 100 * tally.overhead(), "%")
    if not clean:
        false = tally.false.total()
        report.add(f"{who}: false work caught", 100 * tally.caught.total() / false, "%")
        left = false - tally.caught.total() - tally.undone.total()
        report.add(f"{who}: false work that stands in the end", left, f"of {false}")
        taken_back = 10_000 * tally.honest_undone / tally.honest
        report.add(f"{who}: honest work undone with its author, a liar", taken_back, "of 10,000")
        report.add(f"{who}: strikes against honest workers", tally.struck["honest"], f"of {tally.struck.total()}")
        report.add(f"{who}: honest workers shut out", tally.out["honest"], f"of {tally.members['honest']}")
        if ours:
            for conduct, count in sorted(tally.acquitted.items()):
                report.add(f"{who}: false segments passed by a replay of {conduct.value}", count, "segments")


def table(lived: Sequence[Lived]) -> str:
    """By kind, of both ways."""
    shares = sorted({one.dishonest for one in lived if one.dishonest})
    columns = [(way, share) for share in shares for way in ("cbtm", "BOINC")]
    found = {(one.way, one.dishonest): one.tally for one in lived}
    lines = [
        "| way to cheat | " + " | ".join(f"{way}, {share:.0%}" for way, share in columns) + " |",
        "| --- " * (len(columns) + 1) + "|",
    ]
    for label in labels():
        cells = []
        for column in columns:
            tally = found[column]
            passed = tally.got_through.get(label, [0])
            out = f"{tally.out[label]}/{tally.members[label]} out"
            if tally.false[label]:
                cells.append(
                    f"{caught(tally, label):.1%}; {np.mean(passed):.2f} (most {max(passed)}); "
                    f"{standing(tally, label):.1%}; {out}"
                )
            else:
                cells.append(f"—; {out}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def alone_table(works: Sequence[Work]) -> str:
    shares = evaluations_alone(list(works), np.random.default_rng(5), times=EVALUATIONS)
    lines = ["| work | fails | cannot be told | passes |", "| --- | --- | --- | --- |"]
    for kind in Kind:
        failed, unsure, passed = (shares[kind][o] for o in (Outcome.FAILED, Outcome.UNSURE, Outcome.PASSED))
        lines.append(f"| {kind.value} | {failed:.1%} | {unsure:.1%} | {passed:.1%} |")
    return "\n".join(lines)


def works_table(works: Sequence[Work]) -> str:
    lines = [
        "| work | gain on its own held-out text, nats a token | rise on other text | deviation of a replay |",
        "| --- | --- | --- | --- |",
    ]
    for kind in Kind:
        mine = [w for w in works if w.kind is kind]
        gains = [float((w.base_losses["own"]["fp32"] - w.losses["own"]["fp32"]).mean()) for w in mine]
        rises = [float((w.losses["canary"]["fp32"] - w.base_losses["canary"]["fp32"]).mean()) for w in mine]
        replays = "; ".join(
            f"{how} {min(found):.2g} to {max(found):.2g}"
            for how in mine[0].deviations
            if (found := [d for w in mine for d in w.deviations[how]])
        )
        lines.append(
            f"| {kind.value} | {min(gains):+.3f} to {max(gains):+.3f} | {min(rises):+.2f} to {max(rises):+.2f}"
            f" | {replays} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_TASKS:,} tasks for each community, under 60 s")
    parser.add_argument("--tasks", type=int, help=f"for each community; {TASKS:,}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file for the tables, in Markdown")
    options = parser.parse_args()
    works = load()
    tasks = options.tasks or (QUICK_TASKS if options.quick else TASKS)
    lived = [
        measure(works, dishonest, judge, tasks=tasks, seed=options.seed)
        for dishonest in DISHONEST
        for judge in (Checking, Redundancy)
    ]
    report = Report(bench="verification")
    for one in lived:
        add(report, one)
    text = "\n\n".join((works_table(works), alone_table(works), table(lived))) + "\n"
    if options.out is not None:
        options.out.write_text(text, "utf-8")
    print(text)
    report.finish()


if __name__ == "__main__":
    main()
