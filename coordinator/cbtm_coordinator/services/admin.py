"""AdminService: what a run owner does."""

from __future__ import annotations

import math
import re
from datetime import timedelta
from typing import Any

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1.admin_service_pb2_grpc import AdminServiceServicer
from cbtm_common import strict_json
from cbtm_common.errors import InvalidArgument, InvalidState
from cbtm_common.files import FileSpec
from cbtm_common.ids import hash_secret, new_id
from cbtm_common.protos import duration, from_duration, timestamp
from cbtm_common.recipe import Recipe
from cbtm_common.run_routing import RunRouting, clustering_digest
from cbtm_coordinator.lifecycle import RunState, TaskKind, TaskState, Verification, WorkerState
from cbtm_coordinator.services import convert, credit, paging
from cbtm_coordinator.services.context import ServiceContext, checked_files
from cbtm_coordinator.services.structure import Structures, add_architecture
from cbtm_coordinator.storage import finish_upload, verify
from cbtm_coordinator.store import (
    Connection,
    acceptance,
    accounts,
    checkpoints,
    events,
    experts,
    identities,
    leases,
    requeue,
    rollback,
    runs,
    tasks,
)
from cbtm_coordinator.store.records import LeaseRecord, NewCluster, NewShard, RunRecord, TaskRecord

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_CLUSTERS = 65_536
# An estimate beyond this tells nobody anything.
_MAX_REMAINING = timedelta(days=36_500)
_FOLDERS = {
    ad.RUN_FILE_KIND_CLUSTERING: "clustering",
    ad.RUN_FILE_KIND_TOKENIZER: "tokenizer",
    ad.RUN_FILE_KIND_BASE_MODEL: "base",
    ad.RUN_FILE_KIND_REPORT: "report",
    ad.RUN_FILE_KIND_SHARD: "shards",
}


class AdminServicer(AdminServiceServicer):
    """See `protos/cbtm_api/v1/admin_service.proto`."""

    def __init__(self, context: ServiceContext, structures: Structures) -> None:
        self._context = context
        self._store = context.store
        self._structures = structures

    # Making a run

    def CreateRun(self, request: ad.CreateRunRequest, context: Any) -> ad.CreateRunResponse:
        recipe = Recipe.from_json(request.recipe_json)
        _check_name(request.name)
        if not 1 <= request.cluster_count <= _MAX_CLUSTERS:
            raise InvalidArgument(
                f"cluster_count: {request.cluster_count} is not in 1..{_MAX_CLUSTERS}", field="cluster_count"
            )

        def answer(tx: Connection) -> ad.CreateRunResponse:
            run = runs.create(
                tx,
                self._store.now(),
                name=request.name,
                cluster_count=request.cluster_count,
                recipe=recipe,
                from_scratch=request.from_scratch,
                verification=_verification(request.verification) or Verification.OFF,
            )
            return ad.CreateRunResponse(run=convert.run(run))

        return self._context.once(request, ad.CreateRunResponse, answer)

    def PrepareRunUpload(self, request: ad.PrepareRunUploadRequest, context: Any) -> ad.PrepareRunUploadResponse:
        folder = _FOLDERS.get(request.kind)
        if folder is None:
            raise InvalidArgument("kind: is not set", field="kind")
        with self._store.writing() as tx:
            run = runs.get(tx, request.run_id)
            if run.state is not RunState.DRAFT:
                raise InvalidState(f"run {run.name} is {run.state}; files are added while it is DRAFT")
            files = checked_files(request.files, maximum=256, prefix=f"runs/{run.id}/{folder}")
            if request.kind != ad.RUN_FILE_KIND_SHARD:
                kind = ad.RunFileKind.Name(request.kind).removeprefix("RUN_FILE_KIND_")
                runs.add_files(tx, run.id, kind, files)
        return ad.PrepareRunUploadResponse(uploads=[self._context.upload(f) for f in files])

    def RegisterClusters(self, request: ad.RegisterClustersRequest, context: Any) -> ad.RegisterClustersResponse:
        first = self._context.first_answer(request, ad.RegisterClustersResponse)
        if first is not None:
            return first
        with self._store.reading() as tx:
            run = runs.get(tx, request.run_id)
        new = [_new_cluster(run, cluster) for cluster in request.clusters]
        # Checked against the store before any row says that they are there.
        for cluster in new:
            for shard in cluster.shards:
                self._landed(shard.file)

        def answer(tx: Connection) -> ad.RegisterClustersResponse:
            registered = runs.register_clusters(tx, runs.get(tx, request.run_id), new)
            wanted = {c.cluster_index for c in new}
            return ad.RegisterClustersResponse(
                clusters=[convert.cluster(c, examples=False) for c in registered if c.cluster_index in wanted]
            )

        return self._context.once(request, ad.RegisterClustersResponse, answer)

    def _landed(self, file: FileSpec) -> None:
        finish_upload(self._context.objects, file, part_size=self._context.part_size)
        verify(self._context.objects, file)

    def StartRun(self, request: ad.StartRunRequest, context: Any) -> ad.StartRunResponse:
        first = self._context.first_answer(request, ad.StartRunResponse)
        if first is not None:
            return first
        with self._store.reading() as tx:
            run = runs.get(tx, request.run_id)
            files = runs.files(tx, run)
        trained = _trained(request.trained_parameters_json)
        for entry in files:
            if entry.kind == "BASE_MODEL":
                finish_upload(self._context.objects, entry.file, part_size=self._context.part_size)
            else:
                self._landed(entry.file)
        base = [entry.file for entry in files if entry.kind == "BASE_MODEL"]
        architecture = self._structures.learn(base, trained) if base else None

        def answer(tx: Connection) -> ad.StartRunResponse:
            now = self._store.now()
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
            self._open(tx, run, seed_steps, recipe.steps, request.model_parameters)
            return ad.StartRunResponse(run=convert.run(runs.get(tx, run.id)))

        return self._context.once(request, ad.StartRunResponse, answer)

    def CreateBaseline(self, request: ad.CreateBaselineRequest, context: Any) -> ad.CreateBaselineResponse:
        def answer(tx: Connection) -> ad.CreateBaselineResponse:
            now = self._store.now()
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
            self._open(tx, runs.get(tx, run.id), 0, steps, parent.model_parameters)
            return ad.CreateBaselineResponse(run=convert.run(runs.get(tx, run.id)))

        return self._context.once(request, ad.CreateBaselineResponse, answer)

    def _open(self, tx: Connection, run: RunRecord, seed_steps: int, expert_steps: int, parameters: int) -> None:
        """Makes the tasks of a CLUSTERED run and opens it."""
        now = self._store.now()
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

    # Running it

    def PauseRun(self, request: ad.PauseRunRequest, context: Any) -> ad.PauseRunResponse:
        return self._context.once(
            request,
            ad.PauseRunResponse,
            lambda tx: ad.PauseRunResponse(run=self._set_paused(tx, request.run, paused=True)),
        )

    def ResumeRun(self, request: ad.ResumeRunRequest, context: Any) -> ad.ResumeRunResponse:
        return self._context.once(
            request,
            ad.ResumeRunResponse,
            lambda tx: ad.ResumeRunResponse(run=self._set_paused(tx, request.run, paused=False)),
        )

    def _set_paused(self, tx: Connection, run: str, *, paused: bool) -> pb.Run:
        return convert.run(runs.set_paused(tx, self._store.now(), runs.get(tx, run), paused))

    def SetRunRouting(self, request: ad.SetRunRoutingRequest, context: Any) -> ad.SetRunRoutingResponse:
        routing = RunRouting.from_json(request.routing_json) if request.routing_json else None

        def answer(tx: Connection) -> ad.SetRunRoutingResponse:
            run = runs.get(tx, request.run)
            if routing is not None:
                _check_routing(routing, run, [entry.file for entry in runs.files(tx, run, "CLUSTERING")])
            return ad.SetRunRoutingResponse(run=convert.run(runs.set_routing(tx, self._store.now(), run, routing)))

        return self._context.once(request, ad.SetRunRoutingResponse, answer)

    def DeleteRun(self, request: ad.DeleteRunRequest, context: Any) -> ad.DeleteRunResponse:
        first = self._context.first_answer(request, ad.DeleteRunResponse)
        if first is not None:
            return first
        with self._store.reading() as tx:
            run_id = runs.get(tx, request.run).id
        objects = self._context.objects
        # Not inside the transaction: a store may take long to list, and other writers would wait.
        listed = list(objects.list(f"runs/{run_id}/"))

        def answer(tx: Connection) -> ad.DeleteRunResponse:
            runs.remove(tx, self._store.now(), runs.get(tx, run_id))
            return ad.DeleteRunResponse(deleted_objects=len(listed), deleted_bytes=sum(o.size for o in listed))

        response = self._context.once(request, ad.DeleteRunResponse, answer)
        # After the rows are gone: what a crash leaves here, or a worker still sends, is collected as orphans.
        for found in listed:
            objects.delete(found.key)
        return response

    def SetVerification(self, request: ad.SetVerificationRequest, context: Any) -> ad.SetVerificationResponse:
        verification = _verification(request.verification)
        if verification is None:
            raise InvalidArgument("verification: is not set; off, peers or trusted", field="verification")

        def answer(tx: Connection) -> ad.SetVerificationResponse:
            run = acceptance.set_verification(tx, self._store.now(), runs.get(tx, request.run, lock=True), verification)
            return ad.SetVerificationResponse(run=convert.run(run))

        return self._context.once(request, ad.SetVerificationResponse, answer)

    def GetRunStatus(self, request: ad.GetRunStatusRequest, context: Any) -> ad.GetRunStatusResponse:
        with self._store.reading() as tx:
            run = runs.get(tx, request.run)
            found = tasks.list_tasks(tx, run.id)
            live = leases.live_leases(tx, [t.id for t in found])
            names = identities.worker_names(tx, [lease.worker_id for lease in live.values()])
            newest = checkpoints.newest_committed(tx, [t.id for t in found])
            clusters = {c.id: c for c in runs.list_clusters(tx, run, limit=run.cluster_count)}
            waiting = identities.backed_off_workers(tx, self._store.now())
        response = ad.GetRunStatusResponse(run=convert.run(run), server_time=timestamp(self._store.now()))
        for task in found:
            lease = live.get(task.id)
            status = response.tasks.add(task=convert.task(task))
            if lease is not None:
                status.lease.CopyFrom(convert.lease(lease, committed_step=task.committed_step))
                status.worker_name = names.get(lease.worker_id, "")
            if task.id in newest:
                # Without its manifest: of a thousand tasks they would not fit into a message.
                status.checkpoint.CopyFrom(convert.checkpoint(newest[task.id], files=False))
            if task.cluster_id in clusters:
                status.cluster.CopyFrom(convert.cluster(clusters[task.cluster_id], examples=False))
        response.waiting_workers.extend(convert.worker(w) for w in waiting)
        remaining = _remaining(run, found, live)
        if remaining is not None:
            response.estimated_remaining.CopyFrom(duration(remaining))
        return response

    def RequeueTask(self, request: ad.RequeueTaskRequest, context: Any) -> ad.RequeueTaskResponse:
        def answer(tx: Connection) -> ad.RequeueTaskResponse:
            run = runs.get(tx, request.run)
            task = tasks.task_of(tx, run, request.cluster_index)
            done = requeue.requeue_task(tx, self._store.now(), run, task, from_start=request.from_start)
            return ad.RequeueTaskResponse(task=convert.task(done))

        return self._context.once(request, ad.RequeueTaskResponse, answer)

    # Workers, tokens, events

    def ListWorkers(self, request: ad.ListWorkersRequest, context: Any) -> ad.ListWorkersResponse:
        size = paging.page_size(request.page_size)
        with self._store.reading() as tx:
            found = identities.list_workers(tx, after_id=paging.decode(request.page_token, ""), limit=size)
            accounts_of = accounts.names(tx, {w.account_id for w in found})
            live = leases.live_leases_of_workers(tx, [w.id for w in found])
        token = paging.encode(found[-1].id) if len(found) == size else ""
        return ad.ListWorkersResponse(
            workers=[convert.worker(w, live=live.get(w.id), account=accounts_of[w.account_id]) for w in found],
            next_page_token=token,
        )

    def RevokeWorker(self, request: ad.RevokeWorkerRequest, context: Any) -> ad.RevokeWorkerResponse:
        def answer(tx: Connection) -> ad.RevokeWorkerResponse:
            now = self._store.now()
            reason = request.reason or "revoked by the run's owner"
            reopened = 0
            if request.quarantine:
                account_id = identities.get_worker(tx, request.worker_id).account_id
                reopened = rollback.quarantine(tx, now, account_id, reason)
            identities.set_revoked(tx, now, request.worker_id, reason)
            leases.revoke_leases(tx, now, reason=reason, worker_id=request.worker_id)
            return ad.RevokeWorkerResponse(
                worker=convert.worker(identities.get_worker(tx, request.worker_id)), reopened_tasks=reopened
            )

        return self._context.once(request, ad.RevokeWorkerResponse, answer)

    def RecoverWorker(self, request: ad.RecoverWorkerRequest, context: Any) -> ad.RecoverWorkerResponse:
        ttl = from_duration(request.ttl) if request.HasField("ttl") else timedelta(days=1)

        def answer(tx: Connection) -> ad.RecoverWorkerResponse:
            now = self._store.now()
            worker = identities.get_worker(tx, request.worker_id)
            if worker.state is WorkerState.REVOKED:
                raise InvalidState(f"worker {worker.id} is revoked: {worker.reason}")
            token_id = new_id("token")
            token = identities.create_token(
                tx,
                now,
                token_id=token_id,
                role="WORKER",
                secret_hash=hash_secret(self._context.secret("worker", token_id)),
                label=f"recovers {worker.id}",
                account=accounts.names(tx, [worker.account_id])[worker.account_id],
                expire_time=now + ttl,
                max_uses=1,
                recovers_worker_id=worker.id,
            )
            return ad.RecoverWorkerResponse(token=convert.token(token))

        response = self._context.once(request, ad.RecoverWorkerResponse, answer)
        response.secret = self._context.token("worker", response.token.id)
        return response

    def CreateToken(self, request: ad.CreateTokenRequest, context: Any) -> ad.CreateTokenResponse:
        if request.role == pb.TOKEN_ROLE_UNSPECIFIED:
            raise InvalidArgument("role: is not set; worker, consumer or admin", field="role")
        if request.max_uses < 0:
            raise InvalidArgument("max_uses: is negative; 0 is without limit", field="max_uses")
        ttl = from_duration(request.ttl) if request.HasField("ttl") else None
        role = pb.TokenRole.Name(request.role).removeprefix("TOKEN_ROLE_")
        if request.trusted and request.role != pb.TOKEN_ROLE_WORKER:
            raise InvalidArgument("trusted: is for a token of role worker", field="trusted")
        account = request.account.strip()
        if len(account) > 200 or not account.isprintable():
            raise InvalidArgument("account: at most 200 printable characters", field="account")

        def answer(tx: Connection) -> ad.CreateTokenResponse:
            now = self._store.now()
            token_id = new_id("token")
            token = identities.create_token(
                tx,
                now,
                token_id=token_id,
                role=role,
                secret_hash=hash_secret(self._context.secret(role.lower(), token_id)),
                label=request.label[:200],
                account=account,
                trusted=request.trusted,
                expire_time=None if ttl is None else now + ttl,
                max_uses=request.max_uses,
            )
            return ad.CreateTokenResponse(token=convert.token(token))

        response = self._context.once(request, ad.CreateTokenResponse, answer)
        response.secret = self._context.token(role.lower(), response.token.id)
        return response

    def ListTokens(self, request: ad.ListTokensRequest, context: Any) -> ad.ListTokensResponse:
        size = paging.page_size(request.page_size)
        with self._store.reading() as tx:
            found = identities.list_tokens(tx, after_id=paging.decode(request.page_token, ""), limit=size)
            accounts_of = accounts.names(tx, {t.account_id for t in found})
        token = paging.encode(found[-1].id) if len(found) == size else ""
        return ad.ListTokensResponse(
            tokens=[convert.token(t, account=accounts_of[t.account_id]) for t in found], next_page_token=token
        )

    def RevokeToken(self, request: ad.RevokeTokenRequest, context: Any) -> ad.RevokeTokenResponse:
        return self._context.once(
            request,
            ad.RevokeTokenResponse,
            lambda tx: ad.RevokeTokenResponse(
                token=convert.token(identities.revoke_token(tx, self._store.now(), request.token_id))
            ),
        )

    def ListEvents(self, request: ad.ListEventsRequest, context: Any) -> ad.ListEventsResponse:
        with self._store.reading() as tx:
            found = events.list_events(
                tx,
                run_id=runs.get(tx, request.run).id if request.run else "",
                task_id=request.task_id,
                worker_id=request.worker_id,
                after_id=request.after_id,
                limit=paging.page_size(request.page_size),
            )
        return ad.ListEventsResponse(events=[convert.event(e) for e in found])

    # Credit

    def GetLeaderboard(self, request: ad.GetLeaderboardRequest, context: Any) -> ad.GetLeaderboardResponse:
        return credit.leaderboard(self._context, request)

    def IssueReceipt(self, request: ad.IssueReceiptRequest, context: Any) -> ad.IssueReceiptResponse:
        with self._store.reading() as tx:
            account_id = accounts.find(tx, request.account)
        return ad.IssueReceiptResponse(receipt=credit.receipt(self._context, account_id))


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"name: {name!r} must be 1 to 100 letters, digits, '.', '_' or '-', and begin with a letter or digit",
            field="name",
        )


def _verification(value: pb.Verification.ValueType) -> Verification | None:
    if value == pb.VERIFICATION_UNSPECIFIED:
        return None
    return Verification(pb.Verification.Name(value).removeprefix("VERIFICATION_"))


def _check_routing(routing: RunRouting, run: RunRecord, clustering: list[FileSpec]) -> None:
    """Raises InvalidArgument when it is not of this run."""
    if routing.clustering != clustering_digest(clustering):
        raise InvalidArgument(
            f"routing_json.clustering: it was calibrated with another clustering model than run {run.name} has",
            field="routing_json.clustering",
        )
    if routing.top_k > run.cluster_count:
        raise InvalidArgument(
            f"routing_json.top_k: {routing.top_k} is more than the {run.cluster_count} experts of run {run.name}",
            field="routing_json.top_k",
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


def _remaining(run: RunRecord, found: list[TaskRecord], live: dict[str, LeaseRecord]) -> timedelta | None:
    """How long the run still takes at the speed of the workers that train now; None while nobody does."""
    recipe = Recipe.from_json(run.recipe_json)
    speed = sum(lease.tokens_per_second for lease in live.values())
    if speed <= 0:
        return None
    tokens = 0
    for task in found:
        if task.state not in (TaskState.DONE, TaskState.FAILED):
            at = max(task.committed_step, live[task.id].step if task.id in live else 0)
            phase = recipe.of_task(seed=task.kind is TaskKind.SEED)
            tokens += (task.total_steps - at) * phase.step_tokens()
    seconds = tokens / speed
    return timedelta(seconds=seconds) if 0 <= seconds < _MAX_REMAINING.total_seconds() else None
