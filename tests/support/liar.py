"""A worker that hands in and reports what it likes, whole and well formed, over the protocol alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.files import describe
from cbtm_common.ids import new_request_id
from cbtm_common.protos import JsonValue
from cbtm_common.recipe import Recipe
from cbtm_common.rpc import Connection, connect
from cbtm_worker.train import Trainer, TrainJob, write_checkpoint
from cbtm_worker.train.replay import sampled
from tests.support.raw_run import RawWorker
from tests.support.run_fixture import Site

# Closed by `close_liars`.
_open: list[Liar] = []


def close_liars() -> None:
    while _open:
        _open.pop().close()


def token_of(here: Site, account: str, *, trusted: bool = False) -> str:
    request = ad.CreateTokenRequest(
        request_id=new_request_id(), role=pb.TOKEN_ROLE_WORKER, account=account, trusted=trusted
    )
    return here.connection.admin.CreateToken(request).secret


class _Door:
    """The coordinator as a worker made by hand finds it."""

    def __init__(self, here: Site) -> None:
        self._here = here

    def connect(self, credential: str | None = None) -> Connection:
        return connect(self._here.target, token=credential)


class Liar(RawWorker):
    """A worker of an account of its own that trains when it likes to, and says what it likes."""

    def __init__(self, here: Site, account: str = "liar") -> None:
        super().__init__(_Door(here), name=account, token=token_of(here, account))  # type: ignore[arg-type]
        _open.append(self)
        self._folder = here.folder / f"liar-{account}"

    def take(self, *kinds: pb.TaskKind.ValueType) -> ws.AcquireLeaseResponse:
        """A task that must be there to get."""
        answer = self.calls.AcquireLease(ws.AcquireLeaseRequest(request_id=new_request_id(), kinds=kinds))
        assert answer.HasField("lease"), answer.reason
        return answer

    def train(
        self, taken: ws.AcquireLeaseResponse, *, shard: Path | None = None
    ) -> tuple[Path, Path, dict[str, JsonValue]]:
        """(folder of the final checkpoint, the base model's folder, metrics) of honest training, or on other text."""
        spec, folder = taken.spec, self._folder / taken.lease.id
        base = folder / "base"
        base.mkdir(parents=True)
        self._fetch(taken.lease, spec.base_model_files, base)
        shards = [shard] if shard else [folder / "shard.safetensors"]
        if shard is None:
            listed = self.calls.ListTaskShards(
                ws.ListTaskShardsRequest(lease_id=taken.lease.id, epoch=taken.lease.epoch)
            ).shards
            assert len(listed) == 1
            (downloaded,) = self.download(taken.lease, [listed[0].file], folder)
            downloaded.rename(shards[0])
        job = TrainJob(
            recipe=Recipe.from_json(spec.run.recipe_json),
            task_id=spec.task.id,
            kind="expert",
            total_steps=spec.task.total_steps,
            model_dir=base,
            shard_paths=shards,
            data_key=spec.task.cluster_id,
        )
        with Trainer(job) as trainer:
            while trainer.step < trainer.total_steps:
                loss = trainer.train_step().loss
            write_checkpoint(trainer.snapshot(final=True), folder / "final", final=True)
            return folder / "final", base, {"loss": loss, **asdict(trainer.computation)}

    def own_shard(self, taken: ws.AcquireLeaseResponse, folder: Path) -> Path:
        """The task's training text."""
        listed = self.calls.ListTaskShards(
            ws.ListTaskShardsRequest(lease_id=taken.lease.id, epoch=taken.lease.epoch)
        ).shards
        folder.mkdir(parents=True, exist_ok=True)
        return self.download(taken.lease, [listed[0].file], folder)[0]

    def hand_in(self, taken: ws.AcquireLeaseResponse, final: Path, metrics: dict[str, JsonValue]) -> None:
        """The final checkpoint in `final`, committed, and the lease given back."""
        step = taken.spec.task.total_steps
        prepared = self.prepare(taken.lease, step, [spec.to_proto() for spec in describe(final)])
        for upload in prepared.uploads:
            self.transfer.upload(upload, final / upload.file.path)
        answer = self.commit(taken.lease, prepared.checkpoint.id, metrics=metrics)
        assert answer.task_state == pb.TASK_STATE_SUBMITTED
        self.release(taken.lease)

    def evaluate(self, *, own_loss: float, train_loss: float) -> None:
        """Scores nothing, and says that the model's losses are these."""
        check = self.take(pb.TASK_KIND_EVALUATE)

        def score(loss: float) -> ws.Score:
            return ws.Score(sequences=64, base_loss=5.0, loss=loss, loss_deviation=0.1, gain_deviation=0.1)

        said = ws.EvaluationReport(own=score(own_loss), train=score(train_loss), canary=score(own_loss))
        request_id, lease = new_request_id(), check.lease
        self.calls.ReportCheck(
            ws.ReportCheckRequest(request_id=request_id, lease_id=lease.id, epoch=lease.epoch, evaluation=said)
        )
        self.release(lease)

    def invent_replay(self) -> ws.ReportCheckResponse:
        """Trains nothing, and says that an unusual device came close: weights stayed where the segment began."""
        check = self.take(pb.TASK_KIND_AUDIT)
        base = self._folder / check.lease.id / "base"
        base.mkdir(parents=True)
        self._fetch(check.lease, check.spec.base_model_files, base)
        audit = ws.AuditReport(
            files=[pb.FileSpec(path="model/model.safetensors", size=10, sha256="0" * 64)],
            # Of the original's micro-batch: with dropout another could not be compared at all.
            computation=ws.Computation(
                device_type="cpu",
                environment="an unusual device",
                precision="fp32",
                micro_batch=check.spec.check.computation.micro_batch,
            ),
            sampled=sampled(base),
        )
        request = ws.ReportCheckRequest(lease_id=check.lease.id, epoch=check.lease.epoch, audit=audit)
        request.request_id = new_request_id()
        assert self.calls.ReportCheck(request).HasField("compare_with")
        request.request_id = new_request_id()
        request.audit.deviation = 0.01
        answer = self.calls.ReportCheck(request)
        self.release(check.lease)
        return answer

    def _fetch(self, lease: pb.Lease, files: object, folder: Path) -> None:
        given = list(files)  # type: ignore[call-overload]
        for path, file in zip(self.download(lease, given, folder), given, strict=True):
            path.rename(folder / file.path)
