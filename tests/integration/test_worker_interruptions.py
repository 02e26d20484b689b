"""Workers that leave, die, or lose their coordinator in the middle of a task: real processes, real gRPC and HTTP.

What is asked each time: that the weights in the end are bit for bit those of a run where nothing went wrong.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.ids import new_request_id
from tests.support.run_fixture import RUN, STEPS, Site, prepare, site, undisturbed

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True, scope="module")
def _prepared() -> None:
    prepare()


@pytest.fixture
def here() -> Iterator[Site]:
    with site("interruptions") as made:
        made.start_coordinator()
        yield made
        made.check_registry()


def finish(here: Site, name: str = "successor", slot: str | None = None) -> str:
    """A worker that does all that is left; what it said. The experts must be those of an undisturbed run."""
    worker = here.start_worker(name, slot=slot)
    assert worker.wait(90) == 0, worker.output
    assert here.is_complete(), here.logs()
    assert here.experts() == undisturbed()
    return worker.output


def test_ctrl_c_hands_the_work_in_and_another_worker_goes_on_from_that_step(here: Site) -> None:
    worker = here.start_worker("first")
    here.until(lambda: here.leased_at_step(8), "step 8")
    worker.send(signal.SIGINT)
    assert worker.wait(30) == 0, worker.output
    assert "saved and gave back cluster" in worker.output
    assert here.leased() is None
    (released,) = here.rows("SELECT * FROM leases")
    assert released["state"] == "RELEASED"
    assert "volunteer stopped" in released["reason"]
    (task,) = [s.task for s in here.tasks() if s.task.committed_step]
    assert 8 <= task.committed_step < STEPS
    assert (task.state, task.attempts) == (pb.TASK_STATE_PENDING, 0)

    said = finish(here)

    assert f"took cluster {task.cluster_index} of {RUN}, from step {task.committed_step}" in said


def test_ctrl_c_before_training_leaves_without_waiting_for_it(here: Site) -> None:
    # Stopped right after it got its lease, and so before any download.
    worker = here.start_worker("first", faults="worker.acquire.after=stop@1")
    here.until(here.leased, "a lease")
    worker.send(signal.SIGINT)
    worker.send(signal.SIGCONT)
    assert worker.wait(30) == 0, worker.output
    assert "saved and gave back cluster" in worker.output
    assert [row["state"] for row in here.rows("SELECT state FROM leases")] == ["RELEASED"]
    assert here.rows("SELECT id FROM checkpoints") == []
    finish(here)


def test_sigterm_does_the_same_as_ctrl_c(here: Site) -> None:
    worker = here.start_worker("first")
    here.until(lambda: here.leased_at_step(2), "step 2")
    worker.send(signal.SIGTERM)
    assert worker.wait(30) == 0, worker.output
    assert any(s.task.committed_step >= 2 for s in here.tasks())
    finish(here)


def test_a_second_ctrl_c_leaves_at_once_and_loses_nothing_but_steps(here: Site) -> None:
    # In the middle of a step so slow that the first signal cannot have its effect yet. Before training it would have.
    worker = here.start_worker("first", step_seconds=5.0)
    here.until(lambda: here.leased_at_step(1), "the first step")
    worker.send(signal.SIGINT)
    here.until(lambda: "press Ctrl-C again" in worker.output, "the first signal's message")
    worker.send(signal.SIGINT)
    assert worker.wait(4) == 128 + signal.SIGINT
    finish(here)


def test_a_killed_worker_costs_its_steps_since_the_last_checkpoint_at_most(here: Site) -> None:
    worker = here.start_worker("first")
    before = here.until(lambda: here.leased_at_step(1, committed=1), "a first checkpoint").task
    worker.kill()

    said = finish(here)

    (expired,) = here.rows("SELECT * FROM leases WHERE state = 'EXPIRED'")
    assert "not renewed in time" in expired["reason"]
    (successor,) = here.rows(f"SELECT * FROM leases WHERE task_id = '{before.id}' AND epoch > {expired['epoch']}")
    begun = here.rows(f"SELECT max(step) AS step FROM checkpoints WHERE lease_id = '{expired['id']}'")[0]["step"]
    assert begun >= before.committed_step
    assert f"from step {before.committed_step}" in said or f"from step {begun}" in said
    assert successor["state"] == "RELEASED"


def test_a_killed_worker_that_comes_back_in_time_goes_on_with_its_lease(here: Site) -> None:
    worker = here.start_worker("first")
    here.until(lambda: here.leased_at_step(3, committed=1), "a first checkpoint")
    worker.kill()

    said = finish(here, name="first again", slot="first")

    assert "going on with the task of the former process" in said
    states = [row["state"] for row in here.rows("SELECT state FROM leases")]
    assert states == ["RELEASED"] * 2
    assert len(here.rows("SELECT id FROM workers")) == 1


def test_a_killed_worker_that_comes_back_too_late_takes_the_task_anew(here: Site) -> None:
    worker = here.start_worker("first")
    here.until(lambda: here.leased_at_step(3), "step 3")
    worker.kill()
    here.until(lambda: here.leased() is None, "the lease to expire")

    said = finish(here, name="first again", slot="first")

    assert "going on with the task of the former process" not in said
    assert "from the start" in said or "from step" in said


def test_a_coordinator_killed_during_training_is_waited_for(here: Site) -> None:
    worker = here.start_worker("patient")
    here.until(lambda: here.leased_at_step(5), "step 5")
    here.coordinator.kill()
    here.check_registry()
    here.start_coordinator()
    assert worker.wait(90) == 0, worker.output
    assert here.experts() == undisturbed()
    assert len(here.rows("SELECT id FROM leases")) == 2


def test_a_coordinator_away_for_longer_than_a_lease_costs_no_work(here: Site) -> None:
    worker = here.start_worker("patient")
    here.until(lambda: here.leased_at_step(5), "step 5")
    here.coordinator.kill()
    # Trains to the end of its task, and then must wait to hand it in.
    final = here.cache("patient") / "workers"
    here.until(lambda: list(final.glob(f"*/tasks/*/s{STEPS:010d}")), "the final checkpoint on disk")
    here.start_coordinator()
    assert worker.wait(90) == 0, worker.output
    assert here.experts() == undisturbed()


def test_a_coordinator_asked_to_stop_leaves_in_order_while_workers_train(here: Site) -> None:
    worker = here.start_worker("patient")
    here.until(lambda: here.leased_at_step(5), "step 5")
    here.stop_coordinator()
    here.start_coordinator()
    assert worker.wait(90) == 0, worker.output
    assert here.experts() == undisturbed()


def test_a_task_requeued_from_the_start_is_dropped_by_its_worker_with_the_reason(here: Site) -> None:
    worker = here.start_worker("first")
    task = here.until(lambda: here.leased_at_step(3), "step 3").task
    here.connection.admin.RequeueTask(
        ad.RequeueTaskRequest(request_id=new_request_id(), run=RUN, cluster_index=task.cluster_index, from_start=True)
    )
    assert worker.wait(90) == 0, worker.output
    assert f"dropped cluster {task.cluster_index}" in worker.output
    assert "REVOKED" in worker.output
    assert here.is_complete()
    assert here.experts() == undisturbed()


def test_a_revoked_worker_leaves_with_the_reason_and_another_finishes(here: Site) -> None:
    worker = here.start_worker("suspect")
    status = here.until(lambda: here.leased_at_step(3), "step 3")
    here.connection.admin.RevokeWorker(
        ad.RevokeWorkerRequest(
            request_id=new_request_id(), worker_id=status.lease.worker_id, reason="sends odd numbers"
        )
    )
    assert worker.wait(30) == 1, worker.output
    assert "sends odd numbers" in worker.output or "revoked" in worker.output
    finish(here)


def test_a_paused_run_gets_its_work_saved_and_is_left_alone_until_it_is_resumed(here: Site) -> None:
    worker = here.start_worker("first", until_idle=False)
    here.until(lambda: here.leased_at_step(3), "step 3")
    here.connection.admin.PauseRun(ad.PauseRunRequest(request_id=new_request_id(), run=RUN))
    here.until(lambda: here.leased() is None, "the lease to be given back")
    here.until(lambda: "waiting for work" in worker.output, "the worker to wait")
    assert "its owner paused the run" in worker.output
    (stopped,) = [s.task for s in here.tasks() if s.task.committed_step]
    assert (stopped.state, stopped.attempts) == (pb.TASK_STATE_PENDING, 0)

    here.connection.admin.ResumeRun(ad.ResumeRunRequest(request_id=new_request_id(), run=RUN))
    here.until(here.is_complete, "the run to complete")
    worker.send(signal.SIGINT)
    assert worker.wait(20) == 0
    assert here.experts() == undisturbed()


def test_two_workers_share_the_run_and_neither_repeats_the_others_task(here: Site) -> None:
    workers = [here.start_worker(name) for name in ("one", "two")]
    for worker in workers:
        assert worker.wait(90) == 0, worker.output
    assert here.experts() == undisturbed()
    leases = here.rows("SELECT task_id, worker_id, epoch FROM leases")
    assert sorted(row["epoch"] for row in leases) == [1, 1]
    assert len({row["worker_id"] for row in leases}) == 2


def test_two_processes_of_one_machine_are_two_workers(here: Site) -> None:
    workers = [here.start_worker(name, slot="machine") for name in ("one", "two")]
    for worker in workers:
        assert worker.wait(90) == 0, worker.output
    assert len(here.rows("SELECT id FROM workers")) == 2
    assert here.experts() == undisturbed()
