"""What the holder of a task reads: shards, the model that it branches from, the tokenizer, where it resumes."""

from __future__ import annotations

from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.files import FileSpec
from cbtm_coordinator.lifecycle import CHECKING, TaskKind
from cbtm_coordinator.services import checks as check_service
from cbtm_coordinator.services import convert, paging
from cbtm_coordinator.services.auth import caller
from cbtm_coordinator.services.context import ServiceContext
from cbtm_coordinator.store import Connection, checkpoints, checks, experts, identities, leases, runs, tasks
from cbtm_coordinator.store.records import RunRecord, TaskRecord
from cbtm_coordinator.store.runs import TRAIN

_MAX_TOKENIZERS = 256


class TaskInputs:
    """Files of tasks; remembers the tokenizers of runs."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context
        self._store = context.store
        # By the run whose they are.
        self._tokenizers: dict[str, list[FileSpec]] = {}

    def list_shards(self, request: ws.ListTaskShardsRequest) -> ws.ListTaskShardsResponse:
        size = paging.page_size(request.page_size)
        after = paging.decode(request.page_token, [])
        with self._store.reading() as tx:
            _, task = leases.require(tx, request.lease_id, request.epoch, caller.get().id)
            if task.kind is TaskKind.EVALUATE:
                return ws.ListTaskShardsResponse()
            if task.kind is TaskKind.AUDIT:
                task = tasks.get_task(tx, checks.get(tx, task.id).subject_id)
            run = runs.get(tx, task.run_id)
            rows = runs.list_shards(
                tx,
                run.data_run_id,
                split=TRAIN,
                # The seed, and a baseline's only expert, train on every cluster.
                cluster_id=None if task.kind is TaskKind.SEED or run.baseline_of else task.cluster_id,
                after=tuple(after) if after else None,
                limit=size,
            )
        more = len(rows) == size
        last = rows[-1] if rows else None
        return ws.ListTaskShardsResponse(
            shards=[convert.shard(shard) for _, shard in rows],
            next_page_token=paging.encode([last[0], last[1].split, last[1].ordinal]) if more and last else "",
        )

    def prepare_download(self, request: ws.PrepareDownloadRequest) -> ws.PrepareDownloadResponse:
        with self._store.reading() as tx:
            _, task = leases.require(tx, request.lease_id, request.epoch, caller.get().id)
            files = self._readable(tx, task, list(request.keys))
        return ws.PrepareDownloadResponse(downloads=self._context.download(files, request.keys))

    def base_model(self, tx: Connection, run: RunRecord, task: TaskRecord) -> list[FileSpec]:
        """What the task branches from: the run's seed for an expert, its base model for the seed itself."""
        seed = experts.seed(tx, run.id) if task.kind is TaskKind.EXPERT else None
        return seed.files if seed else [f.file for f in runs.files(tx, run, "BASE_MODEL")]

    def tokenizer(self, tx: Connection, run: RunRecord) -> list[FileSpec]:
        """Of a run that has tasks, so that its files are what they stay."""
        found = self._tokenizers.get(run.data_run_id)
        if found is None:
            found = [f.file for f in runs.files(tx, run, "TOKENIZER")]
            if len(self._tokenizers) >= _MAX_TOKENIZERS:
                self._tokenizers.clear()
            self._tokenizers[run.data_run_id] = found
        return found

    def _readable(self, tx: Connection, task: TaskRecord, keys: list[str]) -> list[FileSpec]:
        """What the holder of a task may read, shards only among `keys`: none held out, none of another cluster.

        Of an EVALUATE: what it scores, and on what.
        """
        run = runs.get(tx, task.run_id)
        if task.kind in CHECKING:
            check = checks.get(tx, task.id)
            subject = tasks.get_task(tx, check.subject_id)
            account_id = identities.get_worker(tx, caller.get().id).account_id
            files = [*check_service.readable(tx, run, check, account_id), *self.base_model(tx, run, subject)]
            if check.kind is TaskKind.AUDIT:
                files += self._train_shards(tx, run, subject, keys)
            return files
        resume = checkpoints.latest_good(tx, task)
        return [
            *self._train_shards(tx, run, task, keys),
            *self.base_model(tx, run, task),
            *self.tokenizer(tx, run),
            *(resume.files if resume else []),
        ]

    def _train_shards(self, tx: Connection, run: RunRecord, task: TaskRecord, keys: list[str]) -> list[FileSpec]:
        cluster_id = None if task.kind is TaskKind.SEED or run.baseline_of else task.cluster_id
        found = runs.list_shards(tx, run.data_run_id, split=TRAIN, cluster_id=cluster_id, keys=keys)
        return [convert.shard_file(shard) for _, shard in found]
