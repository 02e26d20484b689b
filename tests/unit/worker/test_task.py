"""One task against a scripted coordinator, with a trainer that only counts: resuming, leaving, losing the lease."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
from rich.console import Console

import cbtm_worker.train
from cbtm_common.cache import ContentCache
from cbtm_common.errors import CbtmError, InvalidState, LeaseLost, Unavailable
from cbtm_common.protos import duration
from cbtm_common.recipe import Recipe
from cbtm_common.rpc import RetryPolicy
from cbtm_worker import inputs, sender, task
from cbtm_worker.config import WorkerConfig
from cbtm_worker.display import Display
from cbtm_worker.heartbeat import Heartbeat
from cbtm_worker.inputs import Unfit
from cbtm_worker.local import LocalCheckpoints
from cbtm_worker.session import Held, Session
from cbtm_worker.task import Outcome, TaskContext, TaskRunner
from cbtm_worker.train import StartAgain, TrainJob
from tests.support.scripted_coordinator import ScriptedCoordinator, file_of, lease_of

RECIPE = Recipe(sequence_length=8, global_batch=2, steps=10).to_json()
HELD = Held(lease_id="lease_1", epoch=7)


class Bench:
    """`at[step]` is called when that step is done. Checkpoints are folders that hold their step."""

    def __init__(self, root: Path, coordinator: ScriptedCoordinator, session: Session) -> None:
        self.root = root
        self.coordinator = coordinator
        self.session = session
        self.at: dict[int, Callable[[], Any]] = {}
        self.steps: list[int] = []
        self.jobs: list[TrainJob] = []
        self.stop = threading.Event()
        self.out = io.StringIO()
        self.transfer = coordinator.transfer()
        self.cache = ContentCache(root / "files")
        self.now = 0.0
        self.devices: tuple[str, ...] = ("cpu",)
        self.peers: tuple[str, ...] = ()
        coordinator.objects["base/config.json"] = b"{}"

    @property
    def local(self) -> LocalCheckpoints:
        return LocalCheckpoints(self.root / "tasks" / "task_1")

    def runner(
        self, *, committed: int = 0, continued: bool = False, interval: float = 600.0, recipe: str = RECIPE
    ) -> TaskRunner:
        spec = lease_of(committed_step=committed, recipe_json=recipe).spec
        spec.policy.checkpoint_interval.CopyFrom(duration(interval))
        spec.base_model_files.append(file_of("base/config.json", b"{}"))
        if committed:
            key = f"from/s{committed}/state.json"
            self.coordinator.objects[key] = str(committed).encode()
            spec.resume_from.files.append(file_of(key, self.coordinator.objects[key]))
        self.heartbeat = Heartbeat(self.session, HELD, spec.policy, committed_step=committed, clock=lambda: self.now)
        context = TaskContext(
            session=self.session,
            config=WorkerConfig(coordinator="host:1", token=None, cache_dir=self.root),
            devices=self.devices,
            cache=self.cache,
            transfer=self.transfer,
            tasks_dir=self.root / "tasks",
            display=Display(Console(file=self.out, soft_wrap=True)),
            stop=self.stop,
        )
        return TaskRunner(context, HELD, spec, self.heartbeat, continued=continued)

    def run(self, **options: Any) -> Outcome:
        return self.runner(**options).run()

    def leave_on_disk(self, step: int, *, committed: bool = False) -> None:
        """As a process that died would."""
        write_checkpoint(SimpleNamespace(step=step), self.local.path(step), final=step == 10)
        if committed:
            self.local.mark_committed(step)

    def sent(self) -> list[int]:
        return [int(r.checkpoint_id.removeprefix("ckpt_")) for r in self.coordinator.requests("CommitCheckpoint")]

    def lose(self, state: str) -> None:
        self.coordinator.errors["RenewLease"] = [LeaseLost("it is over", metadata={"state": state})]
        self.heartbeat.beat()


def write_checkpoint(snapshot: Any, directory: Path, *, final: bool) -> None:
    directory.mkdir(parents=True)
    (directory / "state.json").write_text(str(snapshot.step))


def read_state(directory: Path) -> SimpleNamespace:
    return SimpleNamespace(task_id="task_1", step=int((directory / "state.json").read_text()), loss=1.25)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    fast = RetryPolicy(attempts=1, initial=0.001, maximum=0.001)
    monkeypatch.setattr(sender, "_BACKOFF", fast)
    monkeypatch.setattr(inputs, "_RETRY", fast)
    with ScriptedCoordinator() as coordinator, coordinator.connect() as connection:
        made = Bench(tmp_path, coordinator, Session(connection))

        @dataclass(frozen=True)
        class Computed:
            device_type: str = "cpu"
            micro_batch: int = 2

        class Counter:
            def __init__(self, job: Any, *, group: Any) -> None:
                made.jobs.append(job)
                self.step = 0 if job.resume_dir is None else read_state(job.resume_dir).step
                self.total_steps = job.total_steps
                self.computation = Computed()

            def train_step(self) -> SimpleNamespace:
                self.step += 1
                made.steps.append(self.step)
                made.at.pop(self.step, lambda: None)()
                return SimpleNamespace(step=self.step, tokens=16, loss=1.0 / self.step)

            def snapshot(self, *, final: bool = False) -> SimpleNamespace:
                return SimpleNamespace(step=self.step)

            def __enter__(self) -> Self:
                return self

            def __exit__(self, *error: object) -> None:
                return None

        def together(job: Any, peers: tuple[str, ...]) -> contextlib.AbstractContextManager[None]:
            made.peers = peers
            return contextlib.nullcontext()

        for value in (Counter, together, write_checkpoint, read_state):
            name = "Trainer" if value is Counter else value.__name__
            monkeypatch.setitem(cbtm_worker.train.__dict__, name, value)
        yield made
        made.cache.close()
        made.transfer.close()


@pytest.mark.parametrize(("devices", "peers"), [(("a", "b"), ("b",)), (("a", "b", "c"), ("b",))])
def test_a_task_is_trained_on_as_many_devices_as_its_batch_of_two_can_be_dealt_to(
    bench: Bench, devices: tuple[str, ...], peers: tuple[str, ...]
) -> None:
    bench.devices = devices
    assert bench.run() is Outcome.FINISHED
    assert bench.peers == peers
    assert ("training on 2 of 3 devices" in bench.out.getvalue()) == (len(devices) == 3)


def test_a_task_is_trained_from_its_beginning_to_its_end(bench: Bench) -> None:
    assert bench.run() is Outcome.FINISHED
    assert bench.steps == list(range(1, 11))
    assert bench.sent() == [10]
    metrics = bench.coordinator.requests("CommitCheckpoint")[0].metrics
    assert metrics["loss"] == pytest.approx(0.1)
    assert (metrics["device_type"], metrics["micro_batch"]) == ("cpu", 2)


def test_a_task_under_way_goes_on_from_its_checkpoint(bench: Bench) -> None:
    assert bench.run(committed=4) is Outcome.FINISHED
    assert bench.steps[0] == 5


def test_checkpoints_come_at_their_interval(bench: Bench) -> None:
    bench.at = {3: lambda: bench.coordinator.wait_for("CommitCheckpoint")}
    assert bench.run(interval=0.0) is Outcome.FINISHED
    # One by the time of step 3; how many more depends on how fast each is written.
    assert bench.sent()[0] < 3
    assert bench.sent()[-1] == 10


def test_the_coordinator_may_ask_for_a_checkpoint(bench: Bench) -> None:
    def ask() -> None:
        bench.heartbeat._checkpoint = True

    bench.at = {3: ask, 4: lambda: bench.coordinator.wait_for("CommitCheckpoint")}
    assert bench.run() is Outcome.FINISHED
    assert bench.sent() == [3, 10]


def test_a_volunteer_who_leaves_loses_nothing(bench: Bench) -> None:
    bench.at = {6: bench.stop.set}
    assert bench.run() is Outcome.STOPPED
    assert bench.sent() == [6]
    assert "stopping (as asked): saving step 6 of cluster 3" in bench.out.getvalue()


def test_a_volunteer_who_leaves_before_a_step_is_done_saves_nothing(bench: Bench) -> None:
    bench.stop.set()
    assert bench.run(committed=4) is Outcome.STOPPED
    assert bench.steps == bench.sent() == []


def test_a_coordinator_that_stops_the_task_gets_it_saved(bench: Bench) -> None:
    def pause() -> None:
        bench.heartbeat.stop_reason = "its owner paused the run"
        bench.heartbeat.stop.set()

    bench.at = {2: pause}
    assert bench.run() is Outcome.STOPPED
    assert bench.sent() == [2]
    assert "the coordinator asked: its owner paused the run" in bench.out.getvalue()


def test_who_leaves_while_the_coordinator_is_away_keeps_the_work_here(bench: Bench) -> None:
    def leave() -> None:
        bench.coordinator.errors["PrepareUpload"] = [Unavailable("away")] * 10_000
        bench.now += 61
        bench.stop.set()

    bench.at = {6: leave}
    assert bench.run() is Outcome.KEPT
    assert [(c.step, c.committed) for c in bench.local.all()] == [(6, False)]


def test_who_leaves_while_the_store_is_away_keeps_the_work_here(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "_STALL_SECONDS", 0.5)

    def leave() -> None:
        bench.coordinator.errors["CommitCheckpoint"] = [Unavailable("the store is away")] * 10_000
        bench.stop.set()

    bench.at = {6: leave}
    # The coordinator answers, and renews the lease.
    assert bench.run() is Outcome.KEPT
    assert [(c.step, c.committed) for c in bench.local.all()] == [(6, False)]


def test_a_process_that_died_goes_on_from_this_disk_and_hands_in_what_it_had_first(bench: Bench) -> None:
    bench.leave_on_disk(4, committed=True)
    bench.leave_on_disk(7)
    assert bench.run(committed=4, continued=True) is Outcome.FINISHED
    assert bench.steps == [8, 9, 10]
    assert bench.coordinator.requests("PrepareDownload") == []
    assert bench.sent()[-1] == 10


def test_what_was_committed_before_the_process_died_is_not_sent_again(bench: Bench) -> None:
    # The lease is the same, so what it was leased with is behind the disk.
    bench.leave_on_disk(7, committed=True)
    assert bench.run(committed=0, continued=True) is Outcome.FINISHED
    assert bench.steps == [8, 9, 10]
    assert bench.sent() == [10]


def test_a_task_trained_to_its_end_before_a_crash_is_only_handed_in(bench: Bench) -> None:
    bench.leave_on_disk(10)
    assert bench.run(committed=4) is Outcome.FINISHED
    assert bench.steps == []
    assert bench.sent() == [10]
    assert bench.coordinator.requests("CommitCheckpoint")[0].metrics["loss"] == 1.25


def test_a_checkpoint_here_that_is_behind_the_coordinators_is_not_gone_on_from(bench: Bench) -> None:
    bench.leave_on_disk(2)
    assert bench.run(committed=4) is Outcome.FINISHED
    assert bench.steps[0] == 5


def test_a_task_that_its_owner_started_anew_is_started_anew_here(bench: Bench) -> None:
    bench.leave_on_disk(7, committed=True)
    assert bench.run(committed=0) is Outcome.FINISHED
    assert bench.steps[0] == 1


def test_after_an_outage_longer_than_the_lease_the_work_is_kept_for_the_next_lease(bench: Bench) -> None:
    bench.at = {6: lambda: bench.lose("EXPIRED")}
    with pytest.raises(LeaseLost):
        bench.run()
    assert [(c.step, c.committed) for c in bench.local.all()] == [(6, False)]
    assert bench.run() is Outcome.FINISHED
    assert bench.steps[6:] == [7, 8, 9, 10]


def test_a_revoked_lease_leaves_nothing(bench: Bench) -> None:
    bench.at = {6: lambda: bench.lose("REVOKED")}
    with pytest.raises(LeaseLost):
        bench.run()
    assert bench.local.all() == []
    assert bench.sent() == []


@pytest.mark.parametrize(("saved", "committed"), [(True, 0), (False, 0), (False, 4)])
def test_devices_that_share_a_model_and_run_out_of_memory_go_on_from_the_newest_checkpoint(
    bench: Bench, saved: bool, committed: int
) -> None:
    def ask() -> None:
        bench.heartbeat._checkpoint = saved

    def run_out() -> None:
        raise StartAgain("cuda:1 ran out of memory", changes={"micro_batch": 1, "gradient_checkpointing": True})

    bench.devices = ("a", "b")
    bench.at = {6: ask, 8: run_out}
    assert bench.run(committed=committed) is Outcome.FINISHED
    start = 6 if saved else committed
    assert bench.steps == [*range(committed + 1, 9), *range(start + 1, 11)]
    assert [(job.micro_batch, job.gradient_checkpointing) for job in bench.jobs] == [(None, False), (1, True)]
    assert bench.sent()[-1] == 10
    said = f"cuda:1 ran out of memory: going on from step {start} with micro_batch=1, gradient_checkpointing=True"
    assert said in bench.out.getvalue()


def test_what_was_saved_before_training_failed_is_handed_in(bench: Bench) -> None:
    def ask() -> None:
        bench.heartbeat._checkpoint = True

    def fail() -> None:
        raise InvalidState("the loss is nan")

    bench.at = {3: ask, 4: fail}
    with pytest.raises(InvalidState, match="nan"):
        bench.run()
    assert bench.sent() == [3]


def test_an_upload_that_fails_for_good_ends_training(bench: Bench) -> None:
    def ask() -> None:
        bench.coordinator.errors["PrepareUpload"] = [InvalidState("a wrong step")]
        bench.heartbeat._checkpoint = True

    bench.at = {3: ask, 5: lambda: bench.coordinator.wait_for("PrepareUpload")}
    with pytest.raises(CbtmError, match="a wrong step"):
        bench.run()


def test_a_recipe_that_this_version_does_not_know_makes_the_machine_unfit(bench: Bench) -> None:
    with pytest.raises(Unfit, match="upgrade it"):
        bench.runner(recipe='{"steps": 3, "of_a_later_version": 1}')


def test_files_are_not_kept_in_use_after_the_task(bench: Bench) -> None:
    bench.run()
    assert not bench.cache._pinned
