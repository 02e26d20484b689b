"""A run that peers verify, in the registry alone: who takes what, hands in what, and says what of others' work."""

from __future__ import annotations

from dataclasses import asdict, replace

from cbtm_common.files import FileSpec
from cbtm_coordinator.lifecycle import TaskKind, Verification, WorkerState
from cbtm_coordinator.store import acceptance, checks, commits, events, experts, identities, leases, runs
from cbtm_coordinator.store.records import CheckpointRecord, LeaseRecord, TaskRecord
from cbtm_coordinator.structure.movement import moved_to_json
from cbtm_coordinator.verification.audits import Computation
from cbtm_coordinator.verification.evaluation import Evaluation, Score
from tests.support.registry import Registry

GOOD = Evaluation(
    own=Score(sequences=64, base_loss=2.0, loss=1.0, loss_deviation=0.1, gain_deviation=0.1),
    train=Score(sequences=64, base_loss=2.0, loss=1.0, loss_deviation=0.1, gain_deviation=0.1),
)
BAD = Evaluation(
    own=Score(sequences=64, base_loss=2.0, loss=2.0, loss_deviation=0.1, gain_deviation=0.0),
    train=Score(sequences=64, base_loss=2.0, loss=1.0, loss_deviation=0.1, gain_deviation=0.1),
)
COMPUTED = Computation(device_type="cpu", environment="a CPU", precision="fp32", micro_batch=1)
EQUAL: dict[str, object] = {"equal": True, "deviation": None, "computation": asdict(COMPUTED)}
OTHER: dict[str, object] = {"equal": False, "deviation": 1.0, "computation": asdict(COMPUTED)}
# How weights moved: what was committed, what an honest replay of something else comes to, what is invented.
COMMITTED, REPLAYED, INVENTED = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


class Community:
    """A run of one cluster that is verified by peers, and workers of as many accounts as there are names."""

    def __init__(self, registry: Registry, *names: str) -> None:
        self.registry = registry
        self.run = registry.run(clusters=1)
        with registry.store.writing() as tx:
            runs.set_verification(tx, registry.clock(), self.run, Verification.PEERS)
        self.workers = {name: registry.worker(name, account=name) for name in names}
        (task,) = registry.tasks(self.run)
        self.task_id = task.id

    @property
    def task(self) -> TaskRecord:
        return self.registry.task(self.task_id)

    def acquire(self, name: str, *kinds: TaskKind) -> LeaseRecord | None:
        with self.registry.store.writing() as tx:
            worker = identities.get_worker(tx, self.workers[name])
            claim = leases.acquire(
                tx, self.registry.clock(), worker.id, account_id=worker.account_id, kinds=kinds or (TaskKind.EXPERT,)
            )
        return claim.lease if claim else None

    def take(self, name: str, *kinds: TaskKind) -> LeaseRecord:
        lease = self.acquire(name, *kinds)
        assert lease is not None
        return lease

    def save(self, lease: LeaseRecord, step: int, *, audited: bool = False) -> CheckpointRecord:
        """Committed, with an audit of the segment or without."""
        checkpoint = self.registry.begin(lease, step)
        with self.registry.store.writing() as tx:
            done, task = commits.commit(
                tx,
                self.registry.clock(),
                checkpoint=checkpoint,
                worker_id=lease.worker_id,
                epoch=lease.epoch,
                metrics={"loss": 1.0, **asdict(COMPUTED)},
            )
            # A proven worker's: only the draw decides.
            identities.change_standing(tx, lease.worker_id, lambda s: type(s)(trust=1.0, strikes=s.strikes))
            acceptance.after_commit(tx, self.registry.clock(), done, task, draw=lambda: 0.0 if audited else 0.5)
        return done

    def hand_in(self, name: str, *, audited: bool = False) -> CheckpointRecord:
        lease = self.take(name)
        checkpoint = self.save(lease, 100, audited=audited)
        self.registry.release(lease)
        return checkpoint

    def trust(self, *names: str) -> None:
        """Their own work stood up to replays."""
        with self.registry.store.writing() as tx:
            for name in names:
                identities.change_standing(tx, self.workers[name], lambda s: replace(s, trust=0.9))

    def report(self, name: str, found: Evaluation | dict[str, object], *, moved: tuple[float, ...] = REPLAYED) -> None:
        """`moved`: how the weights of a replay did."""
        kind = TaskKind.EVALUATE if isinstance(found, Evaluation) else TaskKind.AUDIT
        lease = self.take(name, kind)
        content = {n: asdict(s) for n, s in found.scores.items()} if isinstance(found, Evaluation) else found
        with self.registry.store.writing() as tx:
            check = checks.get(tx, lease.task_id)
            reporter = identities.get_worker(tx, lease.worker_id)
            if kind is TaskKind.AUDIT:
                moved = COMMITTED if found is EQUAL else moved
                wrote = [FileSpec(path="model/model.safetensors", size=1, sha256=str(moved))]
                checks.note_replay(tx, check, wrote, moved_to_json(replayed=moved, committed=COMMITTED))
            checks.report(tx, self.registry.clock(), lease, check, reporter, content)
            acceptance.decide(tx, self.registry.clock(), check.subject_id)
        self.registry.release(lease)

    def standing(self, name: str) -> tuple[float, int, WorkerState]:
        with self.registry.store.reading() as tx:
            worker = identities.get_worker(tx, self.workers[name])
        return worker.trust, worker.strikes, worker.state

    def experts(self) -> list[int]:
        """Versions of the cluster's current expert."""
        with self.registry.store.reading() as tx:
            return [e.version for e in experts.current(tx, self.run.id) if e.cluster_index == 0]

    def kinds(self) -> list[str]:
        with self.registry.store.writing() as tx:
            return [event.kind for event in events.list_events(tx, run_id=self.run.id, limit=1000)]
