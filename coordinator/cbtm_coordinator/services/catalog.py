"""CatalogService: what consumers read. Nothing here changes anything."""

from __future__ import annotations

import hashlib
import math
import tempfile
import threading
from pathlib import Path
from typing import Any

from cbtm_api.v1 import catalog_service_pb2 as cs
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1.catalog_service_pb2_grpc import CatalogServiceServicer
from cbtm_common.errors import InvalidArgument, NotFound, PermissionDenied
from cbtm_common.files import FileSpec, safe_join
from cbtm_common.ids import cluster_id
from cbtm_common.recipe import Recipe
from cbtm_common.routing import Router, load_router
from cbtm_common.run_routing import RunRouting
from cbtm_coordinator.services import convert, credit, paging
from cbtm_coordinator.services.auth import Role, caller
from cbtm_coordinator.services.context import ServiceContext
from cbtm_coordinator.store import Connection, experts, runs
from cbtm_coordinator.store.records import RunRecord

_MAX_TEXTS = 64
_MAX_TEXT_BYTES = 1 << 20
_FILE_FIELDS = {
    "CLUSTERING": "clustering_files",
    "TOKENIZER": "tokenizer_files",
    "BASE_MODEL": "base_model_files",
    "REPORT": "report_files",
}


class CatalogServicer(CatalogServiceServicer):
    """See `protos/cbtm_api/v1/catalog_service.proto`."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context
        self._store = context.store
        self._routers: dict[str, Router] = {}
        self._lock = threading.Lock()

    def ListRuns(self, request: cs.ListRunsRequest, context: Any) -> cs.ListRunsResponse:
        size = paging.page_size(request.page_size)
        with self._store.reading() as tx:
            found = runs.list_runs(tx, after_id=paging.decode(request.page_token, ""), limit=size)
        token = paging.encode(found[-1].id) if len(found) == size else ""
        return cs.ListRunsResponse(runs=[convert.run(r) for r in found], next_page_token=token)

    def GetRun(self, request: cs.GetRunRequest, context: Any) -> cs.GetRunResponse:
        with self._store.reading() as tx:
            return cs.GetRunResponse(run=convert.run(runs.get(tx, request.run)))

    def ListClusters(self, request: cs.ListClustersRequest, context: Any) -> cs.ListClustersResponse:
        size = paging.page_size(request.page_size)
        with self._store.reading() as tx:
            run = runs.get(tx, request.run)
            found = runs.list_clusters(tx, run, after=paging.decode(request.page_token, -1), limit=size)
        page = paging.fitting([convert.cluster(c) for c in found])
        more = len(found) == size or len(page) < len(found)
        return cs.ListClustersResponse(
            clusters=page, next_page_token=paging.encode(page[-1].index) if page and more else ""
        )

    def ListExperts(self, request: cs.ListExpertsRequest, context: Any) -> cs.ListExpertsResponse:
        with self._store.reading() as tx:
            run = runs.get(tx, request.run)
            found = experts.current(tx, run.id)
        size = paging.page_size(request.page_size)
        after = paging.decode(request.page_token, -2)
        page = paging.fitting([convert.expert(e) for e in found if e.cluster_index > after][:size])
        version = hashlib.sha256(" ".join(e.id for e in found).encode()).hexdigest()[:16]
        more = bool(page) and page[-1].id != found[-1].id
        return cs.ListExpertsResponse(
            experts=page,
            next_page_token=paging.encode(page[-1].cluster_index) if more else "",
            catalog_version=version,
        )

    def ListShards(self, request: cs.ListShardsRequest, context: Any) -> cs.ListShardsResponse:
        if caller.get().role is Role.ANONYMOUS:
            raise PermissionDenied("shards are for a token of role consumer or admin; the models are open")
        size = paging.page_size(request.page_size)
        after = paging.decode(request.page_token, [])
        split = pb.Split.Name(request.split).removeprefix("SPLIT_") if request.split else None
        with self._store.reading() as tx:
            run = runs.get(tx, request.run)
            rows = runs.list_shards(
                tx,
                run.data_run_id,
                split=split,
                cluster_id=request.cluster_id or None,
                after=tuple(after) if after else None,
                limit=size,
            )
        last = rows[-1] if len(rows) == size else None
        return cs.ListShardsResponse(
            shards=[convert.shard(shard) for _, shard in rows],
            next_page_token=paging.encode([last[0], last[1].split, last[1].ordinal]) if last else "",
        )

    def GetRunFiles(self, request: cs.GetRunFilesRequest, context: Any) -> cs.GetRunFilesResponse:
        response = cs.GetRunFilesResponse()
        with self._store.reading() as tx:
            for entry in runs.files(tx, runs.get(tx, request.run)):
                getattr(response, _FILE_FIELDS[entry.kind]).append(entry.file.to_proto())
        return response

    def PrepareDownload(
        self, request: cs.CatalogServicePrepareDownloadRequest, context: Any
    ) -> cs.CatalogServicePrepareDownloadResponse:
        with self._store.reading() as tx:
            run = runs.get(tx, request.run)
            files = self._readable(tx, run, list(request.keys))
        return cs.CatalogServicePrepareDownloadResponse(downloads=self._context.download(files, request.keys))

    def _readable(self, tx: Connection, run: RunRecord, keys: list[str]) -> list[FileSpec]:
        anonymous = caller.get().role is Role.ANONYMOUS
        shards = [] if anonymous else runs.list_shards(tx, run.data_run_id, keys=keys)
        return [
            *(convert.shard_file(shard) for _, shard in shards),
            *(f.file for f in runs.files(tx, run)),
            *(f for expert in experts.current(tx, run.id) for f in expert.files),
        ]

    def GetReceiptKey(self, request: cs.GetReceiptKeyRequest, context: Any) -> cs.GetReceiptKeyResponse:
        return cs.GetReceiptKeyResponse(public_key=credit.public_key(self._context))

    def Route(self, request: cs.RouteRequest, context: Any) -> cs.RouteResponse:
        size = sum(len(text.encode()) for text in request.texts)
        if not 1 <= len(request.texts) <= _MAX_TEXTS or size > _MAX_TEXT_BYTES:
            raise InvalidArgument(f"texts: 1 to {_MAX_TEXTS}, together at most 1 MiB", field="texts")
        if request.top_k < 0:
            raise InvalidArgument(f"top_k: {request.top_k} is negative; 0 is for all", field="top_k")
        if not 0 <= request.temperature < math.inf:
            raise InvalidArgument(
                f"temperature: {request.temperature} is not a positive number; 0 is for the run's", field="temperature"
            )
        with self._store.reading() as tx:
            run = runs.get(tx, request.run)
            entries = runs.files(tx, run, "CLUSTERING")
        if run.baseline_of:
            # It has the clustering of the run it stands beside, but one expert for all of it.
            whole = cs.ClusterWeight(cluster_id=cluster_id(run.id, 0), cluster_index=0, weight=1.0)
            return cs.RouteResponse(routings=[cs.Routing(weights=[whole]) for _ in request.texts])
        router = self._router(run, [e.file for e in entries])
        default = (
            RunRouting.from_json(run.routing_json).temperature
            if run.routing_json
            else Recipe.from_json(run.recipe_json).routing.temperature or router.temperature
        )
        weights = router.weights(
            list(request.texts), top_k=request.top_k or None, temperature=request.temperature or default
        )
        response = cs.RouteResponse()
        for row in weights:
            routing = response.routings.add()
            for index in sorted(row.nonzero()[0].tolist(), key=lambda i: -row[i]):
                routing.weights.add(cluster_id=router.cluster_ids[index], cluster_index=index, weight=float(row[index]))
        return response

    def _router(self, run: RunRecord, files: list[FileSpec]) -> Router:
        """The run's clustering model, read from the store once."""
        if not files:
            raise NotFound(f"run {run.name} is {run.state}: it has no clustering model yet")
        with self._lock:
            if run.data_run_id not in self._routers:
                with tempfile.TemporaryDirectory() as scratch:
                    for file in files:
                        path = safe_join(Path(scratch), file.path)
                        path.parent.mkdir(parents=True, exist_ok=True)
                        with path.open("wb") as out:
                            out.writelines(self._context.objects.read(file.key))
                    self._routers[run.data_run_id] = load_router(Path(scratch))
            return self._routers[run.data_run_id]
