"""Runs whose work is checked by other workers, with real ones from end to end."""

from __future__ import annotations

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
    with site("verification") as made:
        made.start_coordinator()
        yield made


def verify(here: Site, by: pb.Verification.ValueType) -> None:
    request = ad.SetVerificationRequest(request_id=new_request_id(), run=RUN, verification=by)
    here.connection.admin.SetVerification(request)


def token_of(here: Site, account: str, *, trusted: bool = False) -> str:
    request = ad.CreateTokenRequest(
        request_id=new_request_id(), role=pb.TOKEN_ROLE_WORKER, account=account, trusted=trusted
    )
    return here.connection.admin.CreateToken(request).secret


def test_two_accounts_train_a_run_and_check_each_other(here: Site) -> None:
    verify(here, pb.VERIFICATION_PEERS)
    workers = [here.start_worker(name, token=token_of(here, name), step_seconds=0.01) for name in ("ann", "bob")]
    here.until(here.is_complete, "the run to be complete", 90)
    for worker in workers:
        assert worker.wait(60) == 0, worker.output
    # Checking changed nothing of what was trained.
    assert here.experts() == undisturbed()
    here.check_registry()
    assert len(here.events("evaluation.passed")) == 2
    # Of new workers every segment is trained again, by the other account, and comes out the same to the bit.
    audits = here.events("audit.passed")
    assert audits
    assert all(event.detail["equal"] for event in audits)
    accounts = {row["id"]: row["account_id"] for row in here.rows("SELECT id, account_id FROM workers")}
    for check in here.rows("SELECT * FROM checks WHERE report_json != ''"):
        assert accounts[check["reporter_id"]] != check["account_id"] == accounts[check["worker_id"]]
    # What counts for somebody is what is in the accepted experts.
    credited = here.rows("SELECT verified_tokens, trust, strikes FROM workers")
    assert sum(row["verified_tokens"] for row in credited) == 2 * STEPS * 2 * 32
    assert all(row["trust"] > 0 and row["strikes"] == 0 for row in credited)


def test_a_trusted_evaluator_checks_alone_and_trains_nothing(here: Site) -> None:
    verify(here, pb.VERIFICATION_TRUSTED)
    here.start_worker("ann", token=token_of(here, "ann"), step_seconds=0.01)
    here.until(lambda: here.rows("SELECT id FROM tasks WHERE state = 'SUBMITTED'"), "a model to be handed in")
    assert here.experts().keys() == {-1}
    owner = here.start_worker("owner", "--evaluate-only", token=token_of(here, "owner", trusted=True))
    here.until(here.is_complete, "the run to be complete", 90)
    assert here.experts() == undisturbed()
    leased = here.rows(
        "SELECT DISTINCT tasks.kind FROM leases JOIN tasks ON tasks.id = leases.task_id"
        " JOIN workers ON workers.id = leases.worker_id WHERE workers.trusted"
    )
    assert {row["kind"] for row in leased} <= {"EVALUATE", "AUDIT"}
    assert owner.wait(60) == 0, owner.output


def test_verification_turned_off_accepts_what_waits(here: Site) -> None:
    verify(here, pb.VERIFICATION_TRUSTED)
    worker = here.start_worker("ann", token=token_of(here, "ann"), step_seconds=0.0)
    here.until(lambda: len(here.rows("SELECT id FROM tasks WHERE state = 'SUBMITTED'")) == 2, "both to be handed in")
    verify(here, pb.VERIFICATION_OFF)
    assert here.is_complete()
    assert here.experts() == undisturbed()
    assert worker.wait(60) == 0, worker.output
