"""How a run comes to be: its rows, its files and clusters as they land, its tasks; and a dense baseline beside it."""

from __future__ import annotations

import math
import re

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common import strict_json
from cbtm_common.errors import InvalidArgument, InvalidState
from cbtm_common.files import FileSpec
from cbtm_common.recipe import Recipe
from cbtm_coordinator.lifecycle import RunState, Verification
from cbtm_coordinator.services import convert
from cbtm_coordinator.services.context import ServiceContext, checked_files
from cbtm_coordinator.services.structure import Structures, add_architecture
from cbtm_coordinator.storage import finish_upload, verify
from cbtm_coordinator.store import Connection, experts, runs, tasks
from cbtm_coordinator.store.records import NewCluster, NewShard, RunRecord

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_CLUSTERS = 65_536
_FOLDERS = {
    ad.RUN_FILE_KIND_CLUSTERING: "clustering",
    ad.RUN_FILE_KIND_TOKENIZER: "tokenizer",
    ad.RUN_FILE_KIND_BASE_MODEL: "base",
    ad.RUN_FILE_KIND_REPORT: "report",
    ad.RUN_FILE_KIND_SHARD: "shards",
}


def create_run(context: ServiceContext, request: ad.CreateRunRequest) -> ad.CreateRunResponse:
    recipe = Recipe.from_json(request.recipe_json)
    _check_name(request.name)
    if not 1 <= request.cluster_count <= _MAX_CLUSTERS:
        raise InvalidArgument(
            f"cluster_count: {request.cluster_count} is not in 1..{_MAX_CLUSTERS}", field="cluster_count"
        )

    def answer(tx: Connection) -> ad.CreateRunResponse:
        run = runs.create(
            tx,
            context.store.now(),
            name=request.name,
            cluster_count=request.cluster_count,
            recipe=recipe,
            from_scratch=request.from_scratch,
            verification=convert.verification_of(request.verification) or Verification.OFF,
        )
        return ad.CreateRunResponse(run=convert.run(run))

    return context.once(request, ad.CreateRunResponse, answer)


def prepare_upload(context: ServiceContext, request: ad.PrepareRunUploadRequest) -> ad.PrepareRunUploadResponse:
    folder = _FOLDERS.get(request.kind)
    if folder is None:
        raise InvalidArgument("kind: is not set", field="kind")
    with context.store.writing() as tx:
        run = runs.get(tx, request.run_id)
        if run.state is not RunState.DRAFT:
            raise InvalidState(f"run {run.name} is {run.state}; files are added while it is DRAFT")
        files = checked_files(request.files, maximum=256, prefix=f"runs/{run.id}/{folder}")
        if request.kind != ad.RUN_FILE_KIND_SHARD:
            kind = ad.RunFileKind.Name(request.kind).removeprefix("RUN_FILE_KIND_")
            runs.add_files(tx, run.id, kind, files)
    return ad.PrepareRunUploadResponse(uploads=[context.upload(f) for f in files])


def register_clusters(context: ServiceContext, request: ad.RegisterClustersRequest) -> ad.RegisterClustersResponse:
    first = context.first_answer(request, ad.RegisterClustersResponse)
    if first is not None:
        return first
    with context.store.reading() as tx:
        run = runs.get(tx, request.run_id)
    new = [_new_cluster(run, cluster) for cluster in request.clusters]
    # Checked against the store before any row says that they are there.
    for cluster in new:
        for shard in cluster.shards:
            _check_landed(context, shard.file)

    def answer(tx: Connection) -> ad.RegisterClustersResponse:
        registered = runs.register_clusters(tx, runs.get(tx, request.run_id), new)
        wanted = {c.cluster_index for c in new}
        return ad.RegisterClustersResponse(
            clusters=[convert.cluster(c, examples=False) for c in registered if c.cluster_index in wanted]
        )

    return context.once(request, ad.RegisterClustersResponse, answer)


def start_run(context: ServiceContext, structures: Structures, request: ad.StartRunRequest) -> ad.StartRunResponse:
    first = context.first_answer(request, ad.StartRunResponse)
    if first is not None:
        return first
    with context.store.reading() as tx:
        run = runs.get(tx, request.run_id)
        files = runs.files(tx, run)
    trained = _trained(request.trained_parameters_json)
    for entry in files:
        if entry.kind == "BASE_MODEL":
            finish_upload(context.objects, entry.file, part_size=context.part_size)
        else:
            _check_landed(context, entry.file)
    base = [entry.file for entry in files if entry.kind == "BASE_MODEL"]
    architecture = structures.learn(base, trained) if base else None

    def answer(tx: Connection) -> ad.StartRunResponse:
        now = context.store.now()
        run = runs.get(tx, request.run_id)
        runs.change_state(tx, now, run, "register", "")
        kinds = {entry.kind for entry in files}
        for needed in ("CLUSTERING", "TOKENIZER", "BASE_MODEL"):
            if needed not in kinds:
                raise InvalidState(f"run {run.name} has no {needed.lower()} files yet")
        assert architecture is not None
        add_architecture(tx, run.id, architecture)
        found = len(runs.list_clusters(tx, run, limit=run.cluster_count + 1))
        if found != run.cluster_count:
            raise InvalidState(f"run {run.name}: {found} of {run.cluster_count} clusters are registered")
        recipe = Recipe.from_json(run.recipe_json)
        seed_steps = recipe.seed_steps(run.cluster_count) if run.from_scratch else 0
        _open(context, tx, run, seed_steps, recipe.steps, request.model_parameters)
        return ad.StartRunResponse(run=convert.run(runs.get(tx, run.id)))

    return context.once(request, ad.StartRunResponse, answer)


def create_baseline(context: ServiceContext, request: ad.CreateBaselineRequest) -> ad.CreateBaselineResponse:
    def answer(tx: Connection) -> ad.CreateBaselineResponse:
        now = context.store.now()
        parent = runs.get(tx, request.run)
        if parent.baseline_of or parent.state is RunState.DRAFT:
            raise InvalidState(f"run {parent.name} is a baseline itself, or has not started yet")
        name = request.name or f"{parent.name}-dense"
        _check_name(name)
        recipe, steps = _baseline_recipe(parent, request)
        run = runs.create(
            tx,
            now,
            name=name,
            cluster_count=1,
            recipe=recipe,
            from_scratch=parent.from_scratch,
            baseline_of=parent.id,
            verification=parent.verification,
        )
        whole = NewCluster(cluster_index=0, documents=parent.documents, top_terms=[], examples=[], shards=[])
        runs.register_clusters(tx, run, [whole])
        runs.set_train_tokens(tx, run.id, parent.train_tokens)
        runs.change_state(tx, now, runs.get(tx, run.id), "register", "")
        _open(context, tx, runs.get(tx, run.id), 0, steps, parent.model_parameters)
        return ad.CreateBaselineResponse(run=convert.run(runs.get(tx, run.id)))

    return context.once(request, ad.CreateBaselineResponse, answer)


def _open(
    context: ServiceContext, tx: Connection, run: RunRecord, seed_steps: int, expert_steps: int, parameters: int
) -> None:
    """Makes the tasks of a CLUSTERED run and opens it."""
    now = context.store.now()
    run = runs.get(tx, run.id)
    recipe = Recipe.from_json(run.recipe_json)
    tasks.create_tasks(tx, now, run, seed_steps=seed_steps, expert_steps=expert_steps)
    tokens = seed_steps * recipe.for_seed().step_tokens() + expert_steps * run.cluster_count * recipe.step_tokens()
    runs.set_budget(tx, run.id, tokens=tokens, parameters=parameters)
    if seed_steps:
        runs.change_state(tx, now, run, "start_seeding", "")
        return
    base = [entry.file for entry in runs.files(tx, run, "BASE_MODEL")]
    experts.add(tx, now, run_id=run.id, cluster_id=None, cluster_index=-1, files=base)
    runs.change_state(tx, now, run, "start_training", "")


def _check_landed(context: ServiceContext, file: FileSpec) -> None:
    finish_upload(context.objects, file, part_size=context.part_size)
    verify(context.objects, file)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"name: {name!r} must be 1 to 100 letters, digits, '.', '_' or '-', and begin with a letter or digit",
            field="name",
        )


def _trained(text: str) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of parameters; None when nothing is said. Raises InvalidArgument."""
    if not text:
        return None
    try:
        data = strict_json.loads(text)
        shapes = {name: tuple(shape) for name, shape in data.items()}
        if not all(type(length) is int and length >= 0 for shape in shapes.values() for length in shape):
            raise ValueError("a length is no whole number")
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidArgument(
            f"trained_parameters_json: is no object of shapes by name: {error}", field="trained_parameters_json"
        ) from error
    return shapes


def _new_cluster(run: RunRecord, message: ad.NewCluster) -> NewCluster:
    shards = []
    for shard in message.shards:
        (file,) = checked_files([shard.file], maximum=1, prefix=f"runs/{run.id}/shards")
        if shard.split == pb.SPLIT_UNSPECIFIED:
            raise InvalidArgument(f"clusters.shards.split: of {file.path} is not set", field="clusters.shards.split")
        shards.append(
            NewShard(
                split=pb.Split.Name(shard.split).removeprefix("SPLIT_"),
                ordinal=shard.ordinal,
                file=file,
                tokens=shard.tokens,
                documents=shard.documents,
            )
        )
    return NewCluster(
        cluster_index=message.index,
        documents=message.documents,
        top_terms=list(message.top_terms),
        examples=list(message.example_documents),
        shards=shards,
    )


def _baseline_recipe(parent: RunRecord, request: ad.CreateBaselineRequest) -> tuple[Recipe, int]:
    """(recipe, steps) of a dense run with as many training tokens as `parent`. Raises InvalidArgument."""
    if request.global_batch < 0:
        raise InvalidArgument(f"global_batch: {request.global_batch} is not at least 1", field="global_batch")
    if not 0 <= request.learning_rate < math.inf:
        raise InvalidArgument(f"learning_rate: {request.learning_rate} is not above 0", field="learning_rate")
    recipe, steps = Recipe.from_json(parent.recipe_json).dense_beside(
        parent.cluster_count, from_scratch=parent.from_scratch
    )
    if request.learning_rate:
        optimizer = recipe.optimizer.model_copy(update={"learning_rate": request.learning_rate})
        recipe = recipe.model_copy(update={"optimizer": optimizer})
    if request.global_batch:
        tokens = steps * recipe.step_tokens()
        recipe = recipe.model_copy(update={"global_batch": request.global_batch})
        steps = max(1, round(tokens / recipe.step_tokens()))
    return recipe, steps
