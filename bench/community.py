"""A community of volunteers, honest and not, and the ways in which its work is checked. No clock, no network.

Work is drawn from what `bench.works` measured. A task is `SEGMENTS` segments between commits, trained by one worker;
what it hands in is rejected or accepted by `bench.checking` (the coordinator's own decisions) or `bench.redundancy`
(its rival), each of which also says who is shut out. Costs are counted in sequences trained.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from bench.works import Kind, Work

# Of a run as docs/decisions/0018-verification.md takes it: 2,000 steps of 32 sequences.
TASK_SEQUENCES = 64_000
SEGMENTS = 20
SEGMENT_SEQUENCES = TASK_SEQUENCES / SEGMENTS
RUN_TASKS = 100
# An account that was shut out and comes again does so until it has had so many.
SYBIL_ACCOUNTS = 20


class Conduct(StrEnum):
    """How a worker behaves. Those that are not named here do what a `Kind` says."""

    HONEST = "honest"
    # Trains honestly; its group condemns what others hand in, all in the same words.
    SLANDERER = "slandering checkers"
    # Hands the seed back; its group passes that of each other, all in the same words.
    COLLUDER = "colluding checkers"
    # Trains honestly; reports checks that it did not do, as passed.
    INVENTOR = "invented reports"
    # Hands the seed back, and joins under a new account whenever it is shut out.
    SYBIL = "sybil"


@dataclass(kw_only=True, eq=False)
class Member:
    """One worker, of an account of its own. `waits`: it is honest until it has proven itself."""

    number: int
    conduct: Conduct
    kind: Kind
    waits: bool
    # Rounds as a bf16 device or a float32 one does; `environment` tells apart devices of one type.
    half: bool
    environment: str
    # Of one person.
    person: int
    is_out: bool = False
    # False work that was accepted since it joined.
    got_through: int = 0

    @property
    def label(self) -> str:
        if self.conduct is not Conduct.HONEST:
            return self.conduct.value
        if self.kind is Kind.HONEST:
            return "honest"
        return f"{self.kind.value}, once proven" if self.waits else self.kind.value


@dataclass(frozen=True, kw_only=True, eq=False)
class Submission:
    """What a worker hands in of a task. `honest` is what honest training gives there."""

    worker: Member
    work: Work
    honest: Work

    @property
    def is_false(self) -> bool:
        return self.work.kind is not Kind.HONEST

    @property
    def claimed_loss(self) -> float:
        """A liar about its steps says what honest training would; others what training text really scores."""
        if self.work.kind is Kind.HONEST or self.work.kind is Kind.HALF_STEPS:
            return self.work.loss
        if self.work.kind is Kind.FEW_STEPS:
            return self.honest.loss
        return float(self.work.losses["train"]["fp32"].mean())


@dataclass(kw_only=True)
class Tally:
    """Counts by `Member.label`; costs in sequences."""

    submitted: Counter[str] = field(default_factory=Counter)
    false: Counter[str] = field(default_factory=Counter)
    caught: Counter[str] = field(default_factory=Counter)
    # Of the false work that was accepted, what was undone later.
    undone: Counter[str] = field(default_factory=Counter)
    members: Counter[str] = field(default_factory=Counter)
    out: Counter[str] = field(default_factory=Counter)
    # Verdicts against members, for their work and for their reports.
    struck: Counter[str] = field(default_factory=Counter)
    honest: int = 0
    honest_rejected: int = 0
    honest_undone: int = 0
    trained: float = 0.0
    checked: float = 0.0
    # At the end of each run: (trained, checked) so far.
    course: list[tuple[float, float]] = field(default_factory=list)
    # False segments that a replay passed, by the conduct of who reported it.
    acquitted: Counter[Conduct] = field(default_factory=Counter)
    # False work accepted of each account, by label.
    got_through: dict[str, list[int]] = field(default_factory=dict)

    def overhead(self, since: float = 0.0) -> float:
        """Checks as a share of training, from this share of the runs on."""
        trained, checked = self.course[int(since * len(self.course)) - 1] if since else (0.0, 0.0)
        return (self.checked - checked) / (self.trained - trained)


class Bank:
    """Works by kind; a task is one of the honest ones."""

    def __init__(self, works: Sequence[Work]) -> None:
        self._works: Mapping[tuple[Kind, int, int], Work] = {(w.kind, w.cluster, w.order): w for w in works}
        self.tasks = sorted({(w.cluster, w.order) for w in works})

    def of(self, task: tuple[int, int], kind: Kind) -> Work:
        return self._works[(kind, *task)]


class Judge(ABC):
    """Decides over what is handed in. `tally` gets the cost of its checks."""

    def __init__(self, members: Members, bank: Bank, draw: np.random.Generator, tally: Tally) -> None:
        self.members, self.bank, self.draw, self.tally = members, bank, draw, tally

    @abstractmethod
    def is_proven(self, worker: Member) -> bool:
        """Whether it is checked less than a new one, as far as the worker can know."""

    @abstractmethod
    def accepts(self, submission: Submission) -> tuple[bool, Submission]:
        """Whether the work is accepted, and what then stands for the task."""

    def begin_run(self) -> None:  # noqa: B027  # not every way learns from a run
        """Nothing is known of the next run's experts."""

    def collect_undone(self) -> list[Submission]:
        """Accepted work that was taken back since this was last asked, and must be done again."""
        return []


class Members:
    """All workers, those that are shut out included."""

    def __init__(self, found: Sequence[Member], draw: np.random.Generator) -> None:
        self._draw = draw
        self.all = list(found)
        self.active = list(found)

    def others(self, than: Sequence[Member]) -> int:
        return len(self.active) - sum(not member.is_out for member in than)

    def pick(self, but: Sequence[Member] = ()) -> Member:
        while True:
            found = self.active[int(self._draw.integers(len(self.active)))]
            if found not in but:
                return found

    def shut_out(self, member: Member) -> None:
        member.is_out = True
        self.active.remove(member)
        accounts = sum(m.person == member.person for m in self.all)
        if member.conduct is Conduct.SYBIL and accounts < SYBIL_ACCOUNTS:
            again = Member(
                number=len(self.all),
                conduct=member.conduct,
                kind=member.kind,
                waits=member.waits,
                half=member.half,
                environment=member.environment,
                person=member.person,
            )
            self.all.append(again)
            self.active.append(again)


def groups() -> list[tuple[Conduct, Kind, bool]]:
    """Every way to be dishonest."""
    kinds = [kind for kind in Kind if kind is not Kind.HONEST]
    return [
        *((Conduct.HONEST, kind, waits) for kind in kinds for waits in (False, True)),
        (Conduct.COLLUDER, Kind.SEED_RETURNED, False),
        (Conduct.SLANDERER, Kind.HONEST, False),
        (Conduct.INVENTOR, Kind.HONEST, False),
        (Conduct.SYBIL, Kind.SEED_RETURNED, False),
    ]


def community(size: int, dishonest: float, draw: np.random.Generator) -> Members:
    """`dishonest` of the members in equal parts; a third of all on bf16 devices, the others on two kinds of CPU."""
    ways = groups()
    false = [ways[n % len(ways)] for n in range(round(size * dishonest))]
    found = [*false, *[(Conduct.HONEST, Kind.HONEST, False)] * (size - len(false))]
    members = []
    for number, (conduct, kind, waits) in enumerate(found):
        device = int(draw.integers(3))
        members.append(
            Member(
                number=number,
                conduct=conduct,
                kind=kind,
                waits=waits,
                half=device == 2,
                environment=("cpu, AVX2", "cpu, AVX512", "a bf16 device")[device],
                person=number,
            )
        )
    return Members(members, draw)


def live(judge: Judge, *, tasks: int) -> None:
    """`tasks` tasks, in runs of `RUN_TASKS`, each done again until something is accepted."""
    members, tally = judge.members, judge.tally
    for number in range(math.ceil(tasks / RUN_TASKS)):
        judge.begin_run()
        waiting = deque(_tasks(judge, min(RUN_TASKS, tasks - number * RUN_TASKS)))
        while waiting:
            task = waiting.popleft()
            tried: list[Member] = []
            while not _attempt(judge, task, tried):
                pass
            for undone in judge.collect_undone():
                label = undone.worker.label
                if undone.is_false:
                    tally.undone[label] += 1
                else:
                    tally.honest_undone += 1
                waiting.append((undone.honest.cluster, undone.honest.order))
        tally.course.append((tally.trained, tally.checked))
    for member in members.all:
        tally.members[member.label] += 1
        tally.out[member.label] += member.is_out
        tally.got_through.setdefault(member.label, []).append(member.got_through)


def _tasks(judge: Judge, count: int) -> Iterator[tuple[int, int]]:
    for _ in range(count):
        yield judge.bank.tasks[int(judge.draw.integers(len(judge.bank.tasks)))]


def _attempt(judge: Judge, task: tuple[int, int], tried: list[Member]) -> bool:
    """One worker's try at a task; `tried` are those that were refused it."""
    tally = judge.tally
    worker = judge.members.pick(but=tried)
    cheats = not worker.waits or judge.is_proven(worker)
    honest = judge.bank.of(task, Kind.HONEST)
    submission = Submission(worker=worker, work=judge.bank.of(task, worker.kind) if cheats else honest, honest=honest)
    label = worker.label
    accepted, standing = judge.accepts(submission)
    if submission.is_false:
        tally.false[label] += 1
        tally.caught[label] += not accepted
    else:
        tally.honest += 1
        tally.honest_rejected += not accepted
    if not accepted:
        tried.append(worker)
        return False
    if standing.is_false:
        standing.worker.got_through += 1
    return True
