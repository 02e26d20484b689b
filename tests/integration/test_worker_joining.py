"""Joining, refusals and leaving of real workers: what a volunteer is told, and the exit code."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator

import pytest

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.ids import new_request_id
from cbtm_common.security import join_token, split_token
from tests.support.run_fixture import RUN, Site, prepare, site, undisturbed

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True, scope="module")
def _prepared() -> None:
    prepare()


@pytest.fixture
def here() -> Iterator[Site]:
    with site("joining") as made:
        made.start_coordinator()
        yield made


def make_token(here: Site, **options: int) -> ad.CreateTokenResponse:
    return here.connection.admin.CreateToken(
        ad.CreateTokenRequest(request_id=new_request_id(), role=pb.TOKEN_ROLE_WORKER, **options)  # type: ignore[arg-type]
    )


def test_without_a_token_it_is_said_how_to_pass_one(here: Site) -> None:
    worker = here.start_worker("nobody", token="")
    assert worker.wait() == 1
    assert worker.output.count("\n") == 1
    assert "cbtm-worker: error: token: pass --token (or CBTM_TOKEN)" in worker.output


def _made_up(here: Site) -> str:
    """A token of this coordinator's form that it never gave."""
    return join_token("cbtm_worker_made-up", split_token(here.join_token)[1])


def test_an_unknown_token_is_refused_in_one_line(here: Site) -> None:
    worker = here.start_worker("stranger", token=_made_up(here))
    assert worker.wait() == 1
    assert worker.output.startswith("cbtm-worker: error: ")
    assert "token" in worker.output
    assert "Traceback" not in worker.output
    assert here.rows("SELECT id FROM workers") == []


def test_a_revoked_token_lets_nobody_join_and_keeps_who_joined(here: Site) -> None:
    made = make_token(here)
    first = here.start_worker("first", "--max-tasks", "1", token=made.secret)
    here.until(lambda: here.rows("SELECT id FROM workers"), "the first to join")
    here.connection.admin.RevokeToken(ad.RevokeTokenRequest(request_id=new_request_id(), token_id=made.token.id))
    second = here.start_worker("second", token=made.secret)
    assert second.wait() == 1
    assert "revoked" in second.output
    assert first.wait() == 0, first.output


def test_a_token_for_one_machine_lets_one_machine_join(here: Site) -> None:
    made = make_token(here, max_uses=1)
    assert here.start_worker("first", "--max-tasks", "1", token=made.secret).wait() == 0
    second = here.start_worker("second", token=made.secret)
    assert second.wait() == 1
    assert "used" in second.output or "uses" in second.output
    # The first machine needs it no more.
    again = here.start_worker("first again", slot="first", token="")
    assert again.wait() == 0, again.output
    assert here.experts() == undisturbed()


def test_a_worker_that_was_revoked_is_told_so_when_it_comes_back(here: Site) -> None:
    assert here.start_worker("first", "--max-tasks", "1").wait() == 0
    (worker,) = here.rows("SELECT id FROM workers")
    here.connection.admin.RevokeWorker(
        ad.RevokeWorkerRequest(request_id=new_request_id(), worker_id=worker["id"], reason="broken memory")
    )
    again = here.start_worker("first again", slot="first")
    assert again.wait() == 1
    assert "revoked" in again.output
    assert len(here.rows("SELECT id FROM workers")) == 1


def test_max_tasks_is_kept_and_until_idle_leaves_in_the_end(here: Site) -> None:
    first = here.start_worker("first", "--max-tasks", "1", until_idle=False)
    assert first.wait() == 0, first.output
    assert "left with 1 task(s) finished; thank you" in first.output
    assert not here.is_complete()
    second = here.start_worker("second")
    assert second.wait() == 0, second.output
    assert "left with 1 task(s) finished; thank you" in second.output
    assert "leaving: there is no work left" in second.output
    assert here.experts() == undisturbed()


def test_only_a_run_that_was_named_is_worked_on(here: Site) -> None:
    worker = here.start_worker("picky", "--run", "another")
    assert worker.wait() == 1
    assert "another" in worker.output
    named = here.start_worker("named", "--run", RUN, "--max-tasks", "1")
    assert named.wait() == 0, named.output


@pytest.mark.parametrize("shard", ["never", "always"])
def test_two_devices_train_a_task_together_and_one_goes_on_when_they_leave(here: Site, shard: str) -> None:
    both = here.start_worker("both", "--device", "cpu,cpu", "--threads", "2", "--shard", shard, until_idle=False)
    here.until(lambda: here.leased_at_step(5), "step 5 on two devices", 90)
    both.send(signal.SIGINT)
    assert both.wait() == 0, both.output
    assert "training on cpu, cpu" in both.output
    left = max(status.task.committed_step for status in here.tasks())
    assert left >= 5
    one = here.start_worker("one")
    assert one.wait() == 0, one.output
    assert f"from step {left}" in one.output
    assert here.is_complete()
    here.check_registry()


def test_one_worker_for_each_device_has_a_task_of_its_own(here: Site) -> None:
    fleet = here.start_worker("fleet", "--device", "cpu,cpu", "--per-gpu", "--threads", "1", "--max-tasks", "1")
    assert fleet.wait(120) == 0, fleet.output
    assert here.is_complete()
    holders = here.rows("SELECT DISTINCT worker_id FROM leases")
    assert len(holders) == 2
    assert {row["name"] for row in here.rows("SELECT name FROM workers")} == {"fleet cpu"}
    assert here.experts() == undisturbed()
    assert sorted(line for line in fleet.output.splitlines() if "finished cluster" in line) == [
        "cpu: finished cluster 0 of small",
        "cpu: finished cluster 1 of small",
    ]


def test_workers_of_one_machine_leave_together_when_asked(here: Site) -> None:
    finished = here.start_worker("finisher")
    assert finished.wait() == 0, finished.output
    fleet = here.start_worker("fleet", "--device", "cpu,cpu", "--per-gpu", until_idle=False)
    here.until(lambda: fleet.output.count("waiting for work") == 2, "both workers to wait", 90)
    fleet.send(signal.SIGINT)
    assert fleet.wait() == 0, fleet.output
    assert fleet.output.count("left with 0 task(s) finished") == 2


def test_a_worker_without_work_stops_at_once_when_asked(here: Site) -> None:
    here.connection.admin.PauseRun(ad.PauseRunRequest(request_id=new_request_id(), run=RUN))
    worker = here.start_worker("idle", until_idle=False)
    here.until(lambda: "waiting for work" in worker.output, "the worker to wait")
    worker.send(signal.SIGINT)
    assert worker.wait(5) == 0
    assert "left with 0 task(s) finished" in worker.output


def test_secrets_are_in_no_log(here: Site) -> None:
    worker = here.start_worker("careful", "--log-level", "debug")
    assert worker.wait() == 0, worker.output
    identity = json.loads(next(here.cache("careful").glob("workers/*/identity.json")).read_text())
    secrets = [identity["private_key"], "cbtm_session_", "signature=", "Signature "]
    # The coordinator prints the join token for its owner, on stdout.
    for output, kept in (
        (worker.output, [*secrets, here.join_token.partition(".")[0]]),
        (here.coordinator.output, secrets),
    ):
        for secret in kept:
            assert secret not in output


def test_a_machine_that_can_take_part_is_told_so_line_by_line(here: Site) -> None:
    check = here.check_worker()
    assert check.wait() == 0, check.output
    lines = check.output.splitlines()
    assert all(line.startswith(("✓ ", "· ", "    ")) for line in lines), check.output
    for name in ("reachability", "token", "version", "clock", "device", "memory", "disk", "upload", "download"):
        assert any(line[2:].startswith(f"{name}: ") for line in lines), name
    assert here.rows("SELECT id FROM workers") == []


def test_a_check_as_json_says_the_same(here: Site) -> None:
    check = here.check_worker("--json")
    assert check.wait() == 0, check.output
    found = json.loads(check.output)
    assert found["fit"] is True
    assert {"name", "ok", "detail", "remedy"} == set(found["findings"][0])


def test_a_check_with_a_bad_token_says_what_to_do(here: Site) -> None:
    check = here.check_worker(token=_made_up(here))
    assert check.wait() == 1
    assert "✓ reachability" in check.output
    assert "✗ token: " in check.output
    assert "ask the run's owner for a new token" in check.output


def test_a_check_without_a_coordinator_says_what_to_look_at(here: Site) -> None:
    here.stop_coordinator()
    check = here.check_worker("--json")
    assert check.wait() == 1
    (finding,) = json.loads(check.output)["findings"]
    assert finding["name"] == "reachability"
    assert finding["ok"] is False
    assert here.target in finding["detail"]
    assert finding["remedy"]


def test_an_address_that_is_none_is_a_usage_error(here: Site) -> None:
    here.target = "http://example.org"
    worker = here.start_worker("lost")
    assert worker.wait() == 2
    assert "coordinator:" in worker.output
    assert "HOST:PORT" in worker.output


def test_a_device_that_is_not_there_is_named_before_joining(here: Site) -> None:
    worker = here.start_worker("lost", "--device", "cuda:7")
    assert worker.wait() == 2
    assert "--device cpu" in worker.output
    assert here.rows("SELECT id FROM workers") == []
