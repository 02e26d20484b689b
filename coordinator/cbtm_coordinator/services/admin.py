"""AdminService: what a run owner does."""

from __future__ import annotations

from typing import Any

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1.admin_service_pb2_grpc import AdminServiceServicer
from cbtm_common.errors import InvalidArgument
from cbtm_common.files import FileSpec
from cbtm_common.run_routing import RunRouting, clustering_digest
from cbtm_coordinator.services import access, convert, credit, paging, run_opening
from cbtm_coordinator.services.context import ServiceContext
from cbtm_coordinator.services.run_status import run_status
from cbtm_coordinator.services.structure import Structures
from cbtm_coordinator.store import Connection, acceptance, accounts, events, requeue, runs, tasks
from cbtm_coordinator.store.records import RunRecord


class AdminServicer(AdminServiceServicer):
    """See `protos/cbtm_api/v1/admin_service.proto`."""

    def __init__(self, context: ServiceContext, structures: Structures) -> None:
        self._context = context
        self._store = context.store
        self._structures = structures

    # Making a run

    def CreateRun(self, request: ad.CreateRunRequest, context: Any) -> ad.CreateRunResponse:
        return run_opening.create_run(self._context, request)

    def PrepareRunUpload(self, request: ad.PrepareRunUploadRequest, context: Any) -> ad.PrepareRunUploadResponse:
        return run_opening.prepare_upload(self._context, request)

    def RegisterClusters(self, request: ad.RegisterClustersRequest, context: Any) -> ad.RegisterClustersResponse:
        return run_opening.register_clusters(self._context, request)

    def StartRun(self, request: ad.StartRunRequest, context: Any) -> ad.StartRunResponse:
        return run_opening.start_run(self._context, self._structures, request)

    def CreateBaseline(self, request: ad.CreateBaselineRequest, context: Any) -> ad.CreateBaselineResponse:
        return run_opening.create_baseline(self._context, request)

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
        verification = convert.verification_of(request.verification)
        if verification is None:
            raise InvalidArgument("verification: is not set; off, peers or trusted", field="verification")

        def answer(tx: Connection) -> ad.SetVerificationResponse:
            run = acceptance.set_verification(tx, self._store.now(), runs.get(tx, request.run, lock=True), verification)
            return ad.SetVerificationResponse(run=convert.run(run))

        return self._context.once(request, ad.SetVerificationResponse, answer)

    def GetRunStatus(self, request: ad.GetRunStatusRequest, context: Any) -> ad.GetRunStatusResponse:
        return run_status(self._context, request)

    def RequeueTask(self, request: ad.RequeueTaskRequest, context: Any) -> ad.RequeueTaskResponse:
        def answer(tx: Connection) -> ad.RequeueTaskResponse:
            run = runs.get(tx, request.run)
            task = tasks.task_of(tx, run, request.cluster_index)
            done = requeue.requeue_task(tx, self._store.now(), run, task, from_start=request.from_start)
            return ad.RequeueTaskResponse(task=convert.task(done))

        return self._context.once(request, ad.RequeueTaskResponse, answer)

    # Workers, tokens, events

    def ListWorkers(self, request: ad.ListWorkersRequest, context: Any) -> ad.ListWorkersResponse:
        return access.list_workers(self._context, request)

    def RevokeWorker(self, request: ad.RevokeWorkerRequest, context: Any) -> ad.RevokeWorkerResponse:
        return access.revoke_worker(self._context, request)

    def RecoverWorker(self, request: ad.RecoverWorkerRequest, context: Any) -> ad.RecoverWorkerResponse:
        return access.recover_worker(self._context, request)

    def CreateToken(self, request: ad.CreateTokenRequest, context: Any) -> ad.CreateTokenResponse:
        return access.create_token(self._context, request)

    def ListTokens(self, request: ad.ListTokensRequest, context: Any) -> ad.ListTokensResponse:
        return access.list_tokens(self._context, request)

    def RevokeToken(self, request: ad.RevokeTokenRequest, context: Any) -> ad.RevokeTokenResponse:
        return access.revoke_token(self._context, request)

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
