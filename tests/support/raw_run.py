"""A run made and worked on by raw calls, without clustering or training: for tests of the services themselves.

Its files are small but real: token shards, a clustering model that can be loaded, checkpoints with safetensors in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import catalog_service_pb2 as cs
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.files import FileSpec, describe, hash_file
from cbtm_common.ids import cluster_id, new_request_id
from cbtm_common.keys import new_key, public_key_of, registration_text, sign
from cbtm_common.protos import JsonValue, struct
from cbtm_common.recipe import LeaseRecipe, Recipe
from cbtm_common.routing import CentroidRouter
from cbtm_common.routing.embedding import TermEmbedding
from cbtm_common.rpc import Connection, Credential
from cbtm_common.run_routing import RunRouting, clustering_digest
from cbtm_common.shards import write_shard
from cbtm_common.transfer import Transfer
from cbtm_worker.identity import Identity
from cbtm_worker.session import Session
from tests.support.checkpoints import base_tensors, moments, stamp, write_model
from tests.support.coordinator import RunningCoordinator

STEPS = 10
RECIPE = Recipe(
    sequence_length=8,
    global_batch=1,
    steps=STEPS,
    lease=LeaseRecipe(lease_seconds=120, renew_seconds=1, checkpoint_seconds=600, max_attempts=3),
)
_VOCABULARY = 50
_EOS = 0


def make_run(
    admin: Connection,
    folder: Path,
    *,
    name: str = "web",
    clusters: int = 2,
    recipe: Recipe = RECIPE,
    start: bool = True,
) -> pb.Run:
    """A run in TRAINING with one training and one held-out shard for each cluster; without `start`, still a DRAFT."""
    run = create_run(admin, name=name, clusters=clusters, recipe=recipe)
    work = folder / name
    with Transfer.beside(admin) as transfer:
        for kind, made in _run_files(run, work, clusters).items():
            _send(admin, transfer, run, kind, made)
    new = new_clusters(admin, run, work / "shards", clusters)
    register = ad.RegisterClustersRequest(request_id=new_request_id(), run_id=run.id, clusters=new)
    admin.admin.RegisterClusters(register)
    if not start:
        return run
    begin = ad.StartRunRequest(request_id=new_request_id(), run_id=run.id, model_parameters=25)
    return admin.admin.StartRun(begin).run


def create_run(admin: Connection, *, name: str = "web", clusters: int = 2, recipe: Recipe = RECIPE) -> pb.Run:
    """A run in DRAFT."""
    create = ad.CreateRunRequest(
        request_id=new_request_id(), name=name, cluster_count=clusters, recipe_json=recipe.to_json()
    )
    return admin.admin.CreateRun(create).run


def calibrated(admin: Connection, run: pb.Run, **fields: Any) -> RunRouting:
    """A routing that `run` may be given."""
    files = admin.catalog.GetRunFiles(cs.GetRunFilesRequest(run=run.id)).clustering_files
    values: dict[str, Any] = {"temperature": 0.5, "top_k": 1, "documents": 3, "tokens": 40, "perplexity": 12.5}
    digest = clustering_digest(FileSpec.from_proto(file) for file in files)
    return RunRouting(**{"clustering": digest, **values, **fields})


def new_clusters(admin: Connection, run: pb.Run, folder: Path, clusters: int = 1) -> list[ad.NewCluster]:
    """Clusters to register in a DRAFT, their shards sent."""
    new = _clusters(folder, clusters)
    with Transfer.beside(admin) as transfer:
        _send(admin, transfer, run, ad.RUN_FILE_KIND_SHARD, folder)
    return new


def _send(admin: Connection, transfer: Transfer, run: pb.Run, kind: ad.RunFileKind.ValueType, folder: Path) -> None:
    """All files in `folder`, as `kind`."""
    files = [spec.to_proto() for spec in describe(folder)]
    prepare = ad.PrepareRunUploadRequest(request_id=new_request_id(), run_id=run.id, kind=kind, files=files)
    for upload in admin.admin.PrepareRunUpload(prepare).uploads:
        transfer.upload(upload, folder / upload.file.path)


def _run_files(run: pb.Run, work: Path, clusters: int) -> dict[ad.RunFileKind.ValueType, Path]:
    tokenizer, base, router = work / "tokenizer", work / "base", work / "router"
    for folder in (tokenizer, base, router):
        folder.mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    write_model(base, base_tensors())
    terms = [f"term{index}" for index in range(clusters)]
    CentroidRouter(
        cluster_ids=[cluster_id(run.id, index) for index in range(clusters)],
        embedding=TermEmbedding(terms, np.eye(clusters, dtype=np.float32)),
        centroids=np.eye(clusters, dtype=np.float32),
        prior=np.full(clusters, 1 / clusters, np.float32),
    ).save(router)
    return {
        ad.RUN_FILE_KIND_TOKENIZER: tokenizer,
        ad.RUN_FILE_KIND_BASE_MODEL: base,
        ad.RUN_FILE_KIND_CLUSTERING: router,
    }


def _clusters(folder: Path, count: int) -> list[ad.NewCluster]:
    """Writes the shards of `count` clusters, one of each split."""
    folder.mkdir(parents=True)
    clusters = []
    for index in range(count):
        shards = []
        for split in (pb.SPLIT_TRAIN, pb.SPLIT_HELD_OUT):
            # No two shards are alike, and every document ends with the end-of-sequence token.
            tokens = np.array([1 + index, int(split), *range(10, 30), _EOS], dtype=np.uint16)
            written = folder / "written"
            write_shard(written, tokens, np.array([0], np.int64), vocab_size=_VOCABULARY, eos_token_id=_EOS)
            size, digest = hash_file(written)
            file = pb.FileSpec(path=f"{digest}.safetensors", size=size, sha256=digest)
            written.rename(folder / file.path)
            shards.append(ad.NewShard(split=split, ordinal=0, file=file, tokens=len(tokens), documents=1))
        clusters.append(
            ad.NewCluster(index=index, documents=2, top_terms=["a"], example_documents=["An example."], shards=shards)
        )
    return clusters


def checkpoint_folder(folder: Path, *, salt: int = 0, final: bool = False) -> Path:
    """The files of a checkpoint, as a worker writes them, of no task yet; those of another `salt` differ."""
    tensors = base_tensors(salt)
    write_model(folder / "model", tensors)
    (folder / "state.json").write_text("{}")
    if not final:
        save_file(moments(tensors, 0), folder / "optimizer.safetensors")
    return folder


def register_request(key: bytes, *, request_id: str = "", **fields: Any) -> ws.RegisterRequest:
    """A registration of `key`, with its proof."""
    request_id = request_id or new_request_id()
    public_key = public_key_of(key)
    proof = sign(key, registration_text(request_id, public_key))
    return ws.RegisterRequest(request_id=request_id, public_key=public_key, proof=proof, **fields)


class RawWorker:
    """A registered worker that makes each call by hand."""

    def __init__(self, coordinator: RunningCoordinator, *, name: str = "gpu", token: str | None = None) -> None:
        self.connection = coordinator.connect(token or coordinator.token("join"))
        hardware = pb.Hardware(device_type="cpu", cpu_count=1)
        self.key = new_key()
        register = register_request(self.key, name=name, hardware=hardware, version="0.1.0")
        self.id = self.connection.worker.Register(register).worker.id
        Session(self.connection).use(Identity(worker_id=self.id, private_key=self.key.hex()))
        self.calls = self.connection.worker
        self.transfer = Transfer.beside(self.connection)
        # By task id, of all leases that it got.
        self.specs: dict[str, ws.TaskSpec] = {}

    @property
    def bearer(self) -> str:
        """What it shows now."""
        assert isinstance(self.connection.credential, Credential)
        return self.connection.credential.bearer()

    def acquire(self, request_id: str = "", *, run: str = "") -> ws.AcquireLeaseResponse:
        answer = self.calls.AcquireLease(ws.AcquireLeaseRequest(request_id=request_id or new_request_id(), run=run))
        if answer.HasField("lease"):
            self.specs[answer.lease.task_id] = answer.spec
        return answer

    def lease(self) -> pb.Lease:
        """A lease that must be there to get."""
        answer = self.acquire()
        assert answer.HasField("lease"), answer.reason
        return answer.lease

    def renew(self, lease: pb.Lease, *, step: int = 0) -> ws.RenewLeaseResponse:
        request = ws.RenewLeaseRequest(lease_id=lease.id, epoch=lease.epoch, progress=pb.Progress(step=step))
        return self.calls.RenewLease(request)

    def prepare(self, lease: pb.Lease, step: int, files: Sequence[pb.FileSpec]) -> ws.PrepareUploadResponse:
        return self.calls.PrepareUpload(
            ws.PrepareUploadRequest(
                request_id=new_request_id(), lease_id=lease.id, epoch=lease.epoch, step=step, files=files
            )
        )

    def upload(self, lease: pb.Lease, step: int, folder: Path) -> ws.PrepareUploadResponse:
        """Makes a folder's checkpoint one of the lease's task, prepares and sends all its files."""
        stamp(folder, self.specs[lease.task_id], step)
        prepared = self.prepare(lease, step, [spec.to_proto() for spec in describe(folder)])
        for upload in prepared.uploads:
            self.transfer.upload(upload, folder / upload.file.path)
        return prepared

    def commit(
        self,
        lease: pb.Lease,
        checkpoint_id: str,
        *,
        request_id: str = "",
        metrics: dict[str, JsonValue] | None = None,
    ) -> ws.CommitCheckpointResponse:
        return self.calls.CommitCheckpoint(
            ws.CommitCheckpointRequest(
                request_id=request_id or new_request_id(),
                lease_id=lease.id,
                epoch=lease.epoch,
                checkpoint_id=checkpoint_id,
                metrics=struct(metrics or {}),
            )
        )

    def save(self, lease: pb.Lease, step: int, folder: Path) -> ws.CommitCheckpointResponse:
        """A checkpoint sent and committed."""
        return self.commit(lease, self.upload(lease, step, folder).checkpoint.id)

    def release(
        self,
        lease: pb.Lease,
        reason: ws.ReleaseReason.ValueType = ws.RELEASE_REASON_FINISHED,
        *,
        request_id: str = "",
    ) -> ws.ReleaseLeaseResponse:
        return self.calls.ReleaseLease(
            ws.ReleaseLeaseRequest(
                request_id=request_id or new_request_id(),
                lease_id=lease.id,
                epoch=lease.epoch,
                release_reason=reason,
            )
        )

    def download(self, lease: pb.Lease, files: Sequence[pb.FileSpec], folder: Path) -> list[Path]:
        request = ws.PrepareDownloadRequest(lease_id=lease.id, epoch=lease.epoch, keys=[f.key for f in files])
        paths = []
        for number, download in enumerate(self.calls.PrepareDownload(request).downloads):
            paths.append(folder / f"{number}")
            self.transfer.download(download, paths[-1])
        return paths

    def close(self) -> None:
        self.transfer.close()
        self.connection.close()
