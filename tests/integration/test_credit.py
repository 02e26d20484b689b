"""Credit as people meet it: the leaderboard, and receipts that are checked with no coordinator left to ask."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import catalog_service_pb2 as cs
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.ids import new_request_id
from cbtm_common.rpc import Connection
from cbtm_worker.config import WorkerConfig
from cbtm_worker.identity import Identity, take_slot
from cbtm_worker.receipt import fetch_receipt
from tests.support.coordinator import RunningCoordinator, coord, running_coordinator
from tests.support.raw_run import RECIPE, STEPS, RawWorker, checkpoint_folder, make_run

pytestmark = pytest.mark.integration
_TOKENS = STEPS * RECIPE.step_tokens()


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCoordinator]:
    with running_coordinator(tmp_path_factory.mktemp("credit")) as running:
        yield running


@pytest.fixture(scope="module")
def worker(
    coordinator: RunningCoordinator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RawWorker, WorkerConfig]]:
    """One of account "ann" that trained one of two experts, and where it keeps who it is."""
    folder = tmp_path_factory.mktemp("worker")
    with coordinator.connect(coordinator.token("admin")) as admin:
        make_run(admin, folder, clusters=2)
        request = ad.CreateTokenRequest(request_id=new_request_id(), role=pb.TOKEN_ROLE_WORKER, account="ann")
        token = admin.admin.CreateToken(request).secret
    with contextlib.closing(RawWorker(coordinator, token=token)) as made:
        lease = made.lease()
        made.save(lease, STEPS, checkpoint_folder(folder / "checkpoint", final=True))
        made.release(lease)
        slot = take_slot(folder / "cache", coordinator.target)
        slot.save(Identity(worker_id=made.id, private_key=made.key.hex(), fingerprint=made.connection.fingerprint))
        # Held, as by a worker that is at work.
        yield made, WorkerConfig(coordinator=coordinator.target, token=None, cache_dir=folder / "cache")
        slot.release()


def leaderboard(coordinator: RunningCoordinator, *options: str) -> list[dict[str, object]]:
    done = coord("leaderboard", "--json", *options, data_dir=coordinator.data_dir)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, object]] = json.loads(done.stdout)
    return rows


def test_a_volunteer_gets_a_receipt_that_anybody_can_check_offline(
    coordinator: RunningCoordinator, admin: Connection, worker: tuple[RawWorker, WorkerConfig], tmp_path: Path
) -> None:
    made, config = worker
    (tmp_path / "receipt.json").write_text(fetch_receipt(config), "utf-8")
    key = admin.catalog.GetReceiptKey(cs.GetReceiptKeyRequest()).public_key
    shown = coord("receipt", "key", data_dir=coordinator.data_dir)
    assert shown.stdout.strip() == key
    nowhere = tmp_path / "nowhere"
    verify = ["receipt", "verify", str(tmp_path / "receipt.json"), "--key", key]
    genuine = coord(*verify, "--json", data_dir=nowhere)
    assert genuine.returncode == 0, genuine.stderr
    said = json.loads(genuine.stdout)
    assert (said["account"], said["verified_tokens"]) == ("ann", _TOKENS)
    assert [(line["worker_id"], line["tokens"], line["verification"]) for line in said["lines"]] == [
        (made.id, _TOKENS, "OFF")
    ]

    document = (tmp_path / "receipt.json").read_text("utf-8")
    (tmp_path / "receipt.json").write_text(document.replace(str(_TOKENS), str(9 * _TOKENS)), "utf-8")
    changed = coord(*verify, data_dir=nowhere)
    assert changed.returncode == 1
    assert "not as the holder" in changed.stderr
    assert "Traceback" not in changed.stderr


def test_the_owner_sees_who_trained_what_and_takes_it_back_by_quarantine(
    coordinator: RunningCoordinator, admin: Connection, worker: tuple[RawWorker, WorkerConfig], tmp_path: Path
) -> None:
    made, _ = worker
    (account,) = [row for row in leaderboard(coordinator) if row["account"] == "ann"]
    assert (account["verified_tokens"], account["workers"]) == (_TOKENS, 1)
    (row,) = [row for row in leaderboard(coordinator, "--by", "worker") if row["id"] == made.id]
    assert (row["place"], row["account"], row["verified_tokens"]) == (1, "ann", _TOKENS)

    revoke = ad.RevokeWorkerRequest(request_id=new_request_id(), worker_id=made.id, quarantine=True)
    admin.admin.RevokeWorker(revoke)
    assert [r["verified_tokens"] for r in leaderboard(coordinator) if r["account"] == "ann"] == [0]
    issued = coord("receipt", "issue", "ann", "--out", str(tmp_path / "ann.json"), data_dir=coordinator.data_dir)
    assert issued.returncode == 0, issued.stderr
    receipt = json.loads((tmp_path / "ann.json").read_text("utf-8"))["receipt"]
    assert receipt["verified_tokens"] == 0
    assert [(line["kind"], line["tokens"]) for line in receipt["lines"]] == [
        ("EARNED", _TOKENS),
        ("TAKEN_BACK", -_TOKENS),
    ]
    unknown = coord("receipt", "issue", "nobody", data_dir=coordinator.data_dir)
    assert unknown.returncode == 1
    assert "there is no account 'nobody'" in unknown.stderr
