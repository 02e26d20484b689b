"""A run's catalog as a consumer reads it: over gRPC for what exists, by signed URLs for the files themselves.

Files go to a content-addressed cache that programs share; an expert is fetched when it is first used. Everything is
checked against the SHA-256 that the coordinator registered. Keeps a connection open until `close`.

    CACHE/files/            content
    CACHE/runs/<run>/<set>/ model directories, tokenizer and router, as links to it
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from cbtm._held_out import HeldOutDocument, HeldOutSplit, in_split
from cbtm._parts import ClusterInfo, EnsembleParts
from cbtm._residency import ExpertSource
from cbtm._routing import single_router
from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import catalog_service_pb2 as cs
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.cache import ContentCache
from cbtm_common.errors import IntegrityError, InvalidState, Unavailable
from cbtm_common.files import FileSpec, safe_join
from cbtm_common.ids import new_request_id
from cbtm_common.recipe import Recipe
from cbtm_common.routing import Router, load_router
from cbtm_common.rpc import connect
from cbtm_common.run_routing import RunRouting, clustering_digest
from cbtm_common.shards import read_shard
from cbtm_common.transfer import Transfer

_PAGE = 200
# Of listing experts, while they change.
_ATTEMPTS = 5


@dataclass(kw_only=True, eq=False)
class CatalogSource:
    """A model of a run; its files are fetched when first asked for."""

    name: str
    catalog: Catalog
    place: str
    files: Sequence[FileSpec]
    _directory: Path | None = field(default=None)

    def config_path(self) -> Path:
        for file in self.files:
            if file.path == "config.json":
                # By content: experts of one run mostly share it, and it is fetched once.
                name = f"{file.sha256}.json"
                return self.catalog.fetch("configs", [dataclasses.replace(file, path=name)]) / name
        raise IntegrityError(f"{self.name}: it was registered without a config.json")

    def directory(self) -> Path:
        if self._directory is None:
            self._directory = self.catalog.fetch(self.place, self.files)
        return self._directory


class Catalog:
    """One run on one coordinator; a context manager. `run` is a name or an id."""

    def __init__(
        self,
        target: str,
        *,
        run: str,
        token: str | None = None,
        cache_dir: Path | None = None,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        directory = cache_dir or default_cache_dir()
        self._directory = directory
        self._on_bytes = on_bytes
        self._connection = connect(target, token=token)
        self._cache: ContentCache | None = None
        self._transfer = Transfer.beside(self._connection)
        self._lock = threading.Lock()
        self._sources: dict[str, CatalogSource] = {}
        try:
            self.run: pb.Run = self._connection.catalog.GetRun(cs.GetRunRequest(run=run)).run
            self._cache = ContentCache(directory / "files")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the connection; experts not fetched by now cannot be used any more."""
        self._connection.close()
        self._transfer.close()
        if self._cache is not None:
            self._cache.close()
            self._cache = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fetch(self, place: str, files: Sequence[FileSpec]) -> Path:
        """`files` as a directory, downloading what this machine lacks."""
        if self._cache is None:
            raise InvalidState("the ensemble is closed; open it anew, or save it to a folder first")
        directory = safe_join(self._directory, f"runs/{self.run.id}/{place}")
        with self._lock:
            return self._cache.materialize(files, directory, self._prepare, self._transfer, on_bytes=self._on_bytes)

    def parts(self) -> EnsembleParts:
        """The ensemble as it is now. Raises InvalidState when no expert is finished yet."""
        clusters = sorted(self._clusters(), key=lambda cluster: cluster.index)
        experts, seed = self._experts()
        if not experts:
            self.run = self._connection.catalog.GetRun(cs.GetRunRequest(run=self.run.id)).run
            state = pb.RunState.Name(self.run.state).removeprefix("RUN_STATE_")
            raise InvalidState(
                f"run {self.run.name}: 0 of {self.run.cluster_count} experts are finished (the run is {state}); "
                "wait for the first one: `cbtm-coord status` shows how far they are"
            )
        files = self._connection.catalog.GetRunFiles(cs.GetRunFilesRequest(run=self.run.id))
        if seed is None and files.base_model_files:
            seed = self._source("seed", "base", files.base_model_files)
        return EnsembleParts(
            run_id=self.run.id,
            run_name=self.run.name,
            router=self._router(clusters, _specs(files.clustering_files)),
            tokenizer_dir=self.fetch("tokenizer", _specs(files.tokenizer_files)),
            clusters=tuple(ClusterInfo(id=c.id, index=c.index, top_terms=tuple(c.top_terms)) for c in clusters),
            experts=experts,
            seed=seed,
            recipe=Recipe.from_json(self.run.recipe_json),
            calibrated=RunRouting.from_json(self.run.routing_json) if self.run.routing_json else None,
            close=self.close,
            reload=self.parts,
        )

    def clustering_digest(self) -> str:
        """Of the run's clustering model, by which a calibrated routing says what it is of."""
        files = self._connection.catalog.GetRunFiles(cs.GetRunFilesRequest(run=self.run.id))
        return clustering_digest(_specs(files.clustering_files))

    def check_admin(self) -> None:
        """Raises PermissionDenied, before long work is done in vain, when this token may not change the run."""
        self._connection.admin.GetRunStatus(ad.GetRunStatusRequest(run=self.run.id))

    def set_routing(self, routing: RunRouting | None) -> None:
        """How the run's experts are mixed by default from now on; None: as its recipe says. Needs a token of role
        admin."""
        text = "" if routing is None else routing.to_json()
        request = ad.SetRunRoutingRequest(request_id=new_request_id(), run=self.run.id, routing_json=text)
        self.run = self._connection.admin.SetRunRouting(request).run

    def baselines(self) -> list[pb.Run]:
        """Runs that stand beside this one as its dense baselines and are complete."""
        pages = _pages(lambda t: self._connection.catalog.ListRuns(cs.ListRunsRequest(page_size=_PAGE, page_token=t)))
        return [
            run
            for page in pages
            for run in page.runs
            if run.baseline_of == self.run.id and run.state == pb.RUN_STATE_COMPLETE
        ]

    def held_out(
        self, *, split: HeldOutSplit = "test", max_tokens_per_cluster: int | None = None
    ) -> list[HeldOutDocument]:
        """Held-out documents of a split, each cluster's in order of its shards; whole ones, until a cluster's tokens
        are enough.

        Needs a token of role consumer or admin. Raises PermissionDenied without.
        """

        def page_at(token: str) -> Any:
            return self._connection.catalog.ListShards(
                cs.ListShardsRequest(run=self.run.id, split=pb.SPLIT_HELD_OUT, page_size=_PAGE, page_token=token)
            )

        shards = sorted(
            (shard for page in _pages(page_at) for shard in page.shards), key=lambda s: (s.cluster_id, s.ordinal)
        )
        documents: list[HeldOutDocument] = []
        tokens: dict[str, int] = {}
        for document in in_split((d for shard in shards for d in self._documents(shard)), split):
            have = tokens.get(document.cluster_id, 0)
            if max_tokens_per_cluster is not None and have >= max_tokens_per_cluster:
                continue
            tokens[document.cluster_id] = have + len(document.token_ids)
            documents.append(document)
        return documents

    def _documents(self, shard: pb.Shard) -> Iterator[HeldOutDocument]:
        # Named by content: the path in a manifest means nothing outside its set.
        spec = dataclasses.replace(FileSpec.from_proto(shard.file), path=f"{shard.file.sha256}.safetensors")
        for ids in read_shard(self.fetch("held_out", [spec]) / spec.path).documents():
            yield HeldOutDocument(token_ids=tuple(ids.tolist()), cluster_id=shard.cluster_id)

    def _clusters(self) -> list[pb.Cluster]:
        def page_at(token: str) -> Any:
            return self._connection.catalog.ListClusters(
                cs.ListClustersRequest(run=self.run.id, page_size=_PAGE, page_token=token)
            )

        return [cluster for page in _pages(page_at) for cluster in page.clusters]

    def _experts(self) -> tuple[dict[str, ExpertSource], ExpertSource | None]:
        def page_at(token: str) -> Any:
            return self._connection.catalog.ListExperts(
                cs.ListExpertsRequest(run=self.run.id, page_size=_PAGE, page_token=token)
            )

        for _ in range(_ATTEMPTS):
            pages = list(_pages(page_at))
            # Pages are of one catalog unless an expert was accepted or withdrawn between them.
            if len({page.catalog_version for page in pages}) == 1:
                break
        else:
            raise Unavailable(f"run {self.run.name}: its experts change faster than they can be listed; try again")
        experts: dict[str, ExpertSource] = {}
        seed: ExpertSource | None = None
        for expert in (expert for page in pages for expert in page.experts):
            name = f"expert {expert.cluster_index}" if expert.cluster_id else "seed"
            source = self._source(name, expert.id, expert.files)
            if expert.cluster_id:
                experts[expert.cluster_id] = source
            else:
                seed = source
        return experts, seed

    def _source(self, name: str, place: str, files: Sequence[pb.FileSpec]) -> CatalogSource:
        """The same object each time, as long as its files are the same."""
        specs = _specs(files)
        source = self._sources.get(place)
        if source is None or list(source.files) != specs:
            source = self._sources[place] = CatalogSource(name=name, catalog=self, place=place, files=specs)
        return source

    def _router(self, clusters: Sequence[pb.Cluster], files: Sequence[FileSpec]) -> Router:
        if len(clusters) == 1:
            # A dense baseline has the clustering of the run it stands beside, but one expert for all of it.
            return single_router(clusters[0].id)
        router = load_router(self.fetch("router", files))
        if set(router.cluster_ids) != {cluster.id for cluster in clusters}:
            raise IntegrityError(f"run {self.run.name}: its clustering model is for other clusters than it has")
        return router

    def _prepare(self, keys: list[str]) -> Sequence[pb.Download]:
        response = self._connection.catalog.PrepareDownload(
            cs.CatalogServicePrepareDownloadRequest(run=self.run.id, keys=keys)
        )
        return list(response.downloads)


def default_cache_dir() -> Path:
    """The user's cache folder for cbtm."""
    from platformdirs import user_cache_path

    return user_cache_path("cbtm") / "models"


def _pages(page_at: Callable[[str], Any]) -> Iterator[Any]:
    token = ""
    while True:
        page = page_at(token)
        yield page
        token = page.next_page_token
        if not token:
            return


def _specs(files: Sequence[pb.FileSpec]) -> list[FileSpec]:
    return [FileSpec.from_proto(file) for file in files]
