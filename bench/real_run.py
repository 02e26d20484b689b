"""A run of real models and shards on a running coordinator, made as a run owner's program makes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.files import describe
from cbtm_common.ids import cluster_id, new_request_id
from cbtm_common.recipe import Recipe
from cbtm_common.routing import CentroidRouter
from cbtm_common.routing.embedding import TermEmbedding
from cbtm_common.rpc import Connection
from cbtm_common.shards import write_shard
from cbtm_common.transfer import Transfer

_SHARD_TOKENS = 200_000


def make_shard(path: Path, *, vocabulary: int, seed: int = 0, tokens: int = _SHARD_TOKENS) -> None:
    """Random tokens, in documents of a thousand."""
    ids = np.random.default_rng(seed).integers(1, vocabulary, size=tokens)
    ids[999::1000] = 0
    write_shard(path, ids, np.arange(0, len(ids), 1000), vocab_size=vocabulary, eos_token_id=0)


def make_run(
    admin: Connection, folder: Path, *, name: str, clusters: int, recipe: Recipe, model: Path, vocabulary: int
) -> pb.Run:
    """A run in TRAINING with a training and a held-out shard for each cluster; `folder` is for its files."""
    create = ad.CreateRunRequest(
        request_id=new_request_id(), name=name, cluster_count=clusters, recipe_json=recipe.to_json()
    )
    run = admin.admin.CreateRun(create).run
    tokenizer, router, shards = folder / "tokenizer", folder / "router", folder / "shards"
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    CentroidRouter(
        cluster_ids=[cluster_id(run.id, index) for index in range(clusters)],
        embedding=TermEmbedding([f"term{index}" for index in range(clusters)], np.eye(clusters, dtype=np.float32)),
        centroids=np.eye(clusters, dtype=np.float32),
        prior=np.full(clusters, 1 / clusters, np.float32),
    ).save(router)
    shards.mkdir()
    new = []
    for index in range(clusters):
        listed = []
        for split, tokens in ((pb.SPLIT_TRAIN, _SHARD_TOKENS), (pb.SPLIT_HELD_OUT, 2000)):
            path = shards / f"{index}-{split}.safetensors"
            make_shard(path, vocabulary=vocabulary, seed=2 * index + int(split), tokens=tokens)
            (file,) = [f.to_proto() for f in describe(shards) if f.path == path.name]
            listed.append(ad.NewShard(split=split, ordinal=0, file=file, tokens=tokens, documents=tokens // 1000))
        new.append(
            ad.NewCluster(index=index, documents=200, top_terms=["a"], example_documents=["An example."], shards=listed)
        )
    with Transfer.beside(admin) as transfer:
        for kind, made in {
            ad.RUN_FILE_KIND_TOKENIZER: tokenizer,
            ad.RUN_FILE_KIND_BASE_MODEL: model,
            ad.RUN_FILE_KIND_CLUSTERING: router,
            ad.RUN_FILE_KIND_SHARD: shards,
        }.items():
            files = [spec.to_proto() for spec in describe(made)]
            prepare = ad.PrepareRunUploadRequest(request_id=new_request_id(), run_id=run.id, kind=kind, files=files)
            for upload in admin.admin.PrepareRunUpload(prepare).uploads:
                transfer.upload(upload, made / upload.file.path)
    admin.admin.RegisterClusters(ad.RegisterClustersRequest(request_id=new_request_id(), run_id=run.id, clusters=new))
    parameters = sum(f.size for f in describe(model)) // 4
    start = ad.StartRunRequest(request_id=new_request_id(), run_id=run.id, model_parameters=parameters)
    return admin.admin.StartRun(start).run
