"""Workers that hand in what they did not train: whole checkpoints, well formed, and wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.errors import CbtmError
from cbtm_common.ids import new_request_id
from cbtm_common.shards import read_shard, write_shard
from tests.support.liar import Liar, close_liars, token_of
from tests.support.run_fixture import RUN, Site, prepare, site, undisturbed

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True, scope="module")
def _prepared() -> None:
    prepare()


@pytest.fixture
def here() -> Iterator[Site]:
    with site("adversary") as made:
        # They do not renew.
        made.set_lease(lease_seconds=120, stall_seconds=120)
        made.start_coordinator()
        yield made
        close_liars()


def verify(here: Site, by: pb.Verification.ValueType) -> None:
    request = ad.SetVerificationRequest(request_id=new_request_id(), run=RUN, verification=by)
    here.connection.admin.SetVerification(request)


def start_evaluator(here: Site) -> None:
    here.start_worker("owner", "--evaluate-only", token=token_of(here, "owner", trusted=True), step_seconds=0.0)


def change_weights(final: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = final / "model" / "model.safetensors"
    save_file({name: change(t).contiguous() for name, t in load_file(path).items()}, path, metadata={"format": "pt"})


def with_noise(final: Path, base: Path) -> None:
    """The base model, moved a little at random instead of trained."""
    shutil.copy(base / "model.safetensors", final / "model" / "model.safetensors")
    draws = torch.Generator().manual_seed(1)
    change_weights(final, lambda t: t + 0.2 * torch.randn(t.shape, generator=draws))


def untrained(final: Path, base: Path) -> None:
    shutil.copy(base / "model.safetensors", final / "model" / "model.safetensors")


def submitted_keys(here: Site) -> list[str]:
    (row,) = here.rows("SELECT files_json FROM checkpoints WHERE state = 'COMMITTED'")
    return [key for _, key, _, _ in json.loads(row["files_json"])]


def rejected(here: Site, kind: str) -> pb.Event:
    """The event that says why; the task is open again, from the seed, and the expert is not there."""
    (event,) = here.until(lambda: here.events(kind), kind, 180)
    (task,) = [status.task for status in here.tasks() if status.task.id == event.task_id]
    assert (task.state, task.committed_step) == (pb.TASK_STATE_PENDING, 0)
    assert task.reason == event.reason
    assert task.cluster_index not in here.experts()
    assert here.rows(f"SELECT id FROM checkpoints WHERE task_id = '{task.id}' AND state != 'REJECTED'") == []
    return event


def test_a_seed_handed_back_is_rejected_and_at_the_second_time_its_account_is_shut_out(here: Site) -> None:
    verify(here, pb.VERIFICATION_TRUSTED)
    liar = Liar(here)
    for _ in range(2):
        taken = liar.take()
        final, base, metrics = liar.train(taken)
        untrained(final, base)
        liar.hand_in(taken, final, metrics)
    start_evaluator(here)
    here.until(lambda: here.rows("SELECT id FROM workers WHERE state = 'REVOKED'"), "the liar to be revoked", 90)
    failures = here.events("evaluation.failed")
    assert len(failures) == 2
    assert all("gains 0.0000" in event.reason and event.detail["scores"]["own"]["sequences"] for event in failures)
    with pytest.raises(CbtmError):
        liar.acquire()
    with pytest.raises(CbtmError):
        Liar(here, "liar-again").connection.worker.Register(
            ws.RegisterRequest(request_id=new_request_id(), name="again", version="0.1.0")
        )
    # What it spoiled is done anew by somebody honest, and comes out as if it had never been here.
    here.start_worker("ann", token=token_of(here, "ann"), step_seconds=0.0)
    here.until(here.is_complete, "the run to be complete", 90)
    assert here.experts() == undisturbed()


def test_weights_with_noise_are_rejected(here: Site) -> None:
    verify(here, pb.VERIFICATION_TRUSTED)
    liar = Liar(here)
    taken = liar.take()
    final, base, metrics = liar.train(taken)
    with_noise(final, base)
    liar.hand_in(taken, final, metrics)
    start_evaluator(here)
    rejected(here, "evaluation.failed")


def test_weights_trained_on_labels_that_are_flipped_are_rejected(here: Site) -> None:
    verify(here, pb.VERIFICATION_TRUSTED)
    liar = Liar(here)
    taken = liar.take()
    path = liar.own_shard(taken, here.folder / "flipped")
    shard = read_shard(path)
    # Every token another one, but for the ends of documents, so that each text is as regular as before.
    tokens, eos = np.asarray(shard.tokens), shard.eos_token_id
    flipped = np.where(tokens == eos, eos, shard.vocab_size - tokens.astype(np.int64)).astype(tokens.dtype)
    target = here.folder / "flipped" / "shard.safetensors"
    write_shard(target, flipped, shard.document_offsets, vocab_size=shard.vocab_size, eos_token_id=eos)
    final, _, metrics = liar.train(taken, shard=target)
    liar.hand_in(taken, final, metrics)
    start_evaluator(here)
    rejected(here, "evaluation.failed")


def test_a_claimed_loss_that_is_a_lie_is_rejected(here: Site) -> None:
    verify(here, pb.VERIFICATION_TRUSTED)
    liar = Liar(here)
    taken = liar.take()
    final, _, metrics = liar.train(taken)
    liar.hand_in(taken, final, {**metrics, "loss": 0.5})
    start_evaluator(here)
    assert "claimed a loss of 0.500" in rejected(here, "evaluation.failed").reason


@pytest.mark.parametrize("attack", ["backdoor", "other data"])
def test_what_scores_well_but_was_not_trained_as_told_is_found_by_a_replay(here: Site, attack: str) -> None:
    """A row of the embedding that a rare token would wake; and text that is good, but not the cluster's."""
    verify(here, pb.VERIFICATION_TRUSTED)
    liar = Liar(here)
    taken = liar.take()
    if attack == "backdoor":
        final, _, metrics = liar.train(taken)
        change_weights(final, lambda t: torch.cat([t[:-1], t[-1:] + 0.01]) if t.dim() == 2 else t)
    else:
        own = read_shard(liar.own_shard(taken, here.folder / "other"))
        middle = len(own.document_offsets) // 2
        target = here.folder / "other" / "half.safetensors"
        write_shard(
            target,
            own.tokens[: own.document_offsets[middle]],
            own.document_offsets[:middle],
            vocab_size=own.vocab_size,
            eos_token_id=own.eos_token_id,
        )
        final, _, metrics = liar.train(taken, shard=target)
    liar.hand_in(taken, final, metrics)
    start_evaluator(here)
    event = rejected(here, "audit.failed")
    assert event.reason == "the same computation gives other weights"
    assert here.events("evaluation.failed") == []
    assert event.detail["deviation"] > 0


def test_evaluators_in_collusion_do_not_save_a_lie_from_the_replay(here: Site) -> None:
    verify(here, pb.VERIFICATION_PEERS)
    liar = Liar(here)
    taken = liar.take()
    final, base, metrics = liar.train(taken)
    untrained(final, base)
    liar.hand_in(taken, final, metrics)
    for friend in [Liar(here, "friend"), Liar(here, "cousin")]:
        friend.evaluate(own_loss=4.0, train_loss=metrics["loss"])  # type: ignore[arg-type]
    assert here.experts().keys() == {-1}
    for name in ("ann", "bob", "cem"):
        here.start_worker(name, "--evaluate-only", token=token_of(here, name), until_idle=False, step_seconds=0.0)
    event = rejected(here, "audit.failed")
    assert "3 of 3 reports" in event.detail["reports"]


def test_a_replay_is_not_believed_without_the_digests_of_what_it_wrote(here: Site) -> None:
    verify(here, pb.VERIFICATION_PEERS)
    liar = Liar(here)
    taken = liar.take()
    final, _, metrics = liar.train(taken)
    liar.hand_in(taken, final, metrics)
    lazy = Liar(here, "lazy")
    check = lazy.take(pb.TASK_KIND_AUDIT)

    def report(audit: ws.AuditReport) -> ws.ReportCheckResponse:
        return lazy.calls.ReportCheck(
            ws.ReportCheckRequest(
                request_id=new_request_id(), lease_id=check.lease.id, epoch=check.lease.epoch, audit=audit
            )
        )

    theirs = [pb.FileSpec(key=key) for key in submitted_keys(here)]
    with pytest.raises(CbtmError):
        lazy.download(check.lease, theirs, here.folder)
    with pytest.raises(CbtmError, match="digests"):
        report(ws.AuditReport(deviation=0.0))
    guess = pb.FileSpec(path="model/model.safetensors", size=10, sha256="0" * 64)
    answer = report(ws.AuditReport(files=[guess]))
    assert answer.HasField("compare_with")
    assert answer.task_state == pb.TASK_STATE_LEASED
    # Now it may compare, but what it said of itself stands: it does not become equal by saying so again.
    lazy.download(check.lease, theirs, here.folder)
    report(ws.AuditReport(files=answer.compare_with.files, deviation=0.9))
    (said,) = here.rows("SELECT report_json FROM checks WHERE report_json != ''")
    assert json.loads(said["report_json"])["equal"] is False


def test_a_pair_of_slanderers_and_an_invented_replay_decide_nothing_and_are_struck(here: Site) -> None:
    verify(here, pb.VERIFICATION_PEERS)
    trainer = Liar(here, "honest trainer")
    taken = trainer.take()
    final, _, metrics = trainer.train(taken)
    trainer.hand_in(taken, final, metrics)
    # All are there from the beginning: where nobody is left to ask, what there is must do.
    sly, vic, lazy = (Liar(here, name) for name in ("sly", "vic", "lazy"))
    for slanderer in (sly, vic):
        slanderer.evaluate(own_loss=6.0, train_loss=6.0)
    assert lazy.invent_replay().task_state == pb.TASK_STATE_DONE
    # Two that condemn alike, and one that says it replayed: nothing is rejected by it, and nothing acquitted.
    assert here.events("evaluation.failed") == here.events("audit.passed") == []
    start_evaluator(here)
    here.until(lambda: here.experts().keys() > {-1}, "the expert to be accepted", 180)
    assert len(here.events("audit.passed")) == len(here.events("evaluation.passed")) == 1
    strikes = here.rows(
        "SELECT accounts.name, strikes FROM workers JOIN accounts ON accounts.id = workers.account_id"
        " WHERE strikes > 0 ORDER BY accounts.name"
    )
    assert [(row["name"], row["strikes"]) for row in strikes] == [("lazy", 1), ("sly", 1), ("vic", 1)]


def test_held_out_text_is_never_for_an_account_that_trained_the_cluster(here: Site) -> None:
    verify(here, pb.VERIFICATION_PEERS)
    trainer, second, spy = Liar(here, "trainer"), Liar(here, "second"), Liar(here, "spy")
    taken = trainer.take()
    final, _, metrics = trainer.train(taken)
    trainer.hand_in(taken, final, metrics)
    # Nobody checks what their own account did.
    mine = trainer.calls.AcquireLease(
        ws.AcquireLeaseRequest(request_id=new_request_id(), kinds=[pb.TASK_KIND_EVALUATE])
    )
    assert not mine.HasField("lease")
    check = spy.take(pb.TASK_KIND_EVALUATE)
    held_out = [shard.file for shard in check.spec.check.own_shards]
    assert [shard.split for shard in check.spec.check.own_shards] == [pb.SPLIT_HELD_OUT]
    spy.download(check.lease, held_out, here.folder)
    # Its other machine takes the cluster once the owner puts it back; from then on the text is closed to both.
    here.connection.admin.RequeueTask(
        ad.RequeueTaskRequest(
            request_id=new_request_id(), run=RUN, cluster_index=taken.spec.task.cluster_index, from_start=True
        )
    )
    again = spy.take(pb.TASK_KIND_EXPERT)
    if again.spec.task.id != taken.spec.task.id:
        again = spy.take(pb.TASK_KIND_EXPERT)
    final, _, metrics = spy.train(again)
    spy.hand_in(again, final, metrics)
    # It saw the text, so that every segment of its work on the cluster is replayed.
    assert here.rows(
        f"SELECT kind FROM checks WHERE subject_id = '{again.spec.task.id}' AND NOT settled AND kind = 'AUDIT'"
    )
    theirs = second.take(pb.TASK_KIND_EVALUATE)
    own = [shard.file for shard in theirs.spec.check.own_shards]
    assert [file.sha256 for file in own] == [file.sha256 for file in held_out]
    with pytest.raises(CbtmError):
        spy.download(theirs.lease, own, here.folder)
