"""Makes a run from a corpus: clusters, shards and uploads it, then opens it. Runs where the corpus is.

A client of AdminService: nothing but the run's files goes to the coordinator's object store, by signed URLs. All that
can be known to be wrong is refused before the run is made; if it fails later, the draft is deleted again.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.cli import human_bytes
from cbtm_common.errors import CbtmError, InvalidArgument
from cbtm_common.files import FileSpec, describe, hash_file
from cbtm_common.ids import cluster_id, new_request_id
from cbtm_common.recipe import Recipe
from cbtm_common.rpc import Connection
from cbtm_common.transfer import Transfer, UrlExpired
from cbtm_coordinator.clustering import seed_model, tokenizer
from cbtm_coordinator.clustering.corpus import Corpus, ReadReport, open_corpus
from cbtm_coordinator.clustering.fit import FitResult, fit
from cbtm_coordinator.clustering.sample import reservoir
from cbtm_coordinator.clustering.sharding import TRAIN, ClusterStats, ShardFile, shard_corpus

_UPLOAD_THREADS = 4
_UPLOAD_BATCH = 32
_CLUSTER_BATCH = 16
# Tokenizer training reads at most this much of the sample: BPE merges settle long before.
_TOKENIZER_CHARACTERS = 100_000_000


@dataclass(frozen=True, kw_only=True)
class CreateRunOptions:
    """What `cbtm-coord run create` was told. Exactly one of `seed_model` and `from_scratch` is set."""

    name: str
    corpus: tuple[str, ...]
    clusters: int
    recipe: Recipe
    seed_model: str | None = None
    from_scratch: Path | None = None
    tokenizer: str | None = None
    text_field: str = "text"
    id_field: str | None = None
    baseline: bool = False
    sample_documents: int = 50_000
    work_dir: Path | None = None


def create_run(connection: Connection, options: CreateRunOptions, console: Console) -> dict[str, Any]:
    """Names and ids of the run made, and of its baseline. Raises CbtmError; then no run is left behind."""
    if options.clusters < 1:
        raise InvalidArgument(f"clusters: {options.clusters} is not at least 1", field="clusters")
    corpus = open_corpus(options.corpus, text_field=options.text_field, id_field=options.id_field)
    if options.from_scratch is not None:
        seed_model.read_config(options.from_scratch)
    request = ad.CreateRunRequest(
        request_id=new_request_id(),
        name=options.name,
        cluster_count=options.clusters,
        recipe_json=options.recipe.to_json(),
        from_scratch=options.from_scratch is not None,
    )
    with _work_dir(options.work_dir) as work, _bars(console) as bars:
        bars.console.print(f"{len(corpus.files)} file(s), {human_bytes(corpus.total_bytes)}")
        maker = _Maker(connection, options, corpus, work, bars)
        texts = maker.sample()
        run = connection.admin.CreateRun(request).run
        try:
            maker.build(run, texts)
        except BaseException:
            with contextlib.suppress(CbtmError):
                connection.admin.DeleteRun(ad.DeleteRunRequest(request_id=new_request_id(), run=run.id))
            raise
    made: dict[str, Any] = {"run": run.name, "id": run.id}
    if options.baseline:
        answer = connection.admin.CreateBaseline(ad.CreateBaselineRequest(request_id=new_request_id(), run=run.id))
        made["baseline"] = answer.run.name
    console.print(
        f"[bold]{run.name}[/] is open to workers; watch it with [bold]cbtm-coord status {run.name} --watch[/]"
    )
    return made


class _Maker:
    """The steps of making one run, sharing its files and progress bars."""

    def __init__(
        self, connection: Connection, options: CreateRunOptions, corpus: Corpus, work: Path, bars: Progress
    ) -> None:
        self._connection = connection
        self._options = options
        self._recipe = options.recipe
        self._corpus = corpus
        self._work = work
        self._bars = bars

    def sample(self) -> list[str]:
        """The first pass: counts documents, draws the sample. Raises InvalidArgument for too few."""
        report = ReadReport()
        bar = self._bars.add_task("reading", total=len(self._corpus.files))
        documents = self._corpus.documents(report, on_file=lambda _: self._bars.advance(bar))
        texts = reservoir(documents, size=self._options.sample_documents, seed=self._recipe.seed)
        if report.documents < self._options.clusters:
            raise InvalidArgument(
                f"clusters: {self._options.clusters} clusters cannot be made of {report.documents} document(s)",
                field="clusters",
            )
        if report.bad_lines:
            first = report.samples[0]
            self._bars.console.print(
                f"[yellow]{report.bad_lines:,} bad line(s) are left out[/], the first: {first.where}: {first.why}"
            )
        self._report = report
        return texts

    def build(self, run: pb.Run, texts: Sequence[str]) -> None:
        base, tokens = self._models(texts)
        fitted = self._fit(run.id, texts)
        shards, stats = self._shard(fitted, tokens)
        self._check_shards(shards, stats)
        self._set_prior(fitted, stats)
        fitted.router.save(self._work / "clustering")
        self._write_report(fitted, stats)
        self._show(fitted, stats)
        self._upload_folder(run.id, ad.RUN_FILE_KIND_CLUSTERING, "clustering")
        self._upload_folder(run.id, ad.RUN_FILE_KIND_TOKENIZER, "tokenizer")
        self._upload_folder(run.id, ad.RUN_FILE_KIND_BASE_MODEL, "base")
        self._upload_folder(run.id, ad.RUN_FILE_KIND_REPORT, "report")
        self._upload_shards(run.id, fitted, shards, stats)
        self._connection.admin.StartRun(
            ad.StartRunRequest(request_id=new_request_id(), run_id=run.id, model_parameters=base.parameters),
            timeout=600,
        )

    def _models(self, texts: Sequence[str]) -> tuple[seed_model.BaseModel, Any]:
        """The base model and the tokenizer, both saved in the work folder."""
        bar = self._bars.add_task("seed model and tokenizer", total=1)
        options, recipe = self._options, self._recipe
        output = self._work / "tokenizer"
        if options.from_scratch is not None:
            fields = seed_model.read_config(options.from_scratch)
            if options.tokenizer is not None:
                tokens = tokenizer.load_tokenizer(options.tokenizer, output)
            else:
                size = int(fields.get("vocab_size", tokenizer.DEFAULT_VOCAB_SIZE))
                tokens = tokenizer.train_tokenizer(
                    _limited(texts), output, vocab_size=size, context=recipe.sequence_length
                )
            base = seed_model.from_scratch(
                options.from_scratch,
                self._work / "base",
                seed=recipe.seed,
                vocab_size=len(tokens),
                eos_token_id=int(tokens.eos_token_id),
            )
        else:
            source = str(options.seed_model)
            if source.startswith("s3://"):
                source = str(seed_model.fetch_prefix(source, self._work / "download"))
            base = seed_model.load_pretrained(source, self._work / "base")
            tokens = tokenizer.load_tokenizer(options.tokenizer or source, output)
        seed_model.check_fit(base, sequence_length=recipe.sequence_length, tokenizer_size=len(tokens))
        self._bars.advance(bar)
        return base, tokens

    def _fit(self, run_id: str, texts: Sequence[str]) -> FitResult:
        bar = self._bars.add_task("clustering", total=None)
        fitted = fit(
            texts,
            [cluster_id(run_id, index) for index in range(self._options.clusters)],
            seed=self._recipe.seed,
            temperature=self._recipe.routing.temperature,
            report=lambda what: self._bars.update(bar, description=f"clustering: {what}"),
        )
        self._bars.update(bar, description="clustering", total=1, completed=1)
        return fitted

    def _shard(self, fitted: FitResult, tokens: Any) -> tuple[list[ShardFile], list[ClusterStats]]:
        bar = self._bars.add_task("assigning and tokenizing", total=self._report.documents)
        return shard_corpus(
            self._corpus.documents(ReadReport()),
            fitted.router,
            tokens,
            self._work / "shards",
            held_out_fraction=self._recipe.held_out_fraction,
            on_documents=lambda count: self._bars.advance(bar, count),
        )

    def _check_shards(self, shards: Sequence[ShardFile], stats: Sequence[ClusterStats]) -> None:
        need = self._recipe.sequence_length + 1
        for index in range(len(stats)):
            longest = max((s.tokens for s in shards if s.cluster_index == index and s.split == TRAIN), default=0)
            if longest < need:
                raise InvalidArgument(
                    f"clusters: cluster {index} has {longest} training tokens, under one sequence of {need}; use fewer "
                    "clusters, a shorter sequence_length or more text",
                    field="clusters",
                )

    def _set_prior(self, fitted: FitResult, stats: Sequence[ClusterStats]) -> None:
        """The prior is each cluster's share of the tokens, known only now."""
        import numpy as np

        tokens = np.array([s.tokens for s in stats], dtype=np.float64)
        fitted.router.prior = (tokens / tokens.sum()).astype(np.float32)

    def _write_report(self, fitted: FitResult, stats: Sequence[ClusterStats]) -> None:
        folder = self._work / "report"
        folder.mkdir(exist_ok=True)
        sizes = [s.documents for s in stats]
        report = {
            "files": len(self._corpus.files),
            "documents": self._report.documents,
            "characters": self._report.characters,
            "bad_lines": self._report.bad_lines,
            "bad_line_samples": [{"where": b.where, "why": b.why} for b in self._report.samples],
            "explained_variance": fitted.explained_variance,
            "inertia": fitted.inertia,
            "largest_to_smallest": max(sizes) / max(1, min(sizes)),
            "clusters": [
                {"index": i, "documents": s.documents, "tokens": s.tokens, "top_terms": list(fitted.top_terms[i])}
                for i, s in enumerate(stats)
            ],
        }
        (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), "utf-8")

    def _show(self, fitted: FitResult, stats: Sequence[ClusterStats]) -> None:
        from rich.table import Table

        table = Table(header_style="bold")
        for name in ("Cluster", "Documents", "Tokens", "Share"):
            table.add_column(name, justify="right")
        table.add_column("Top terms")
        total = sum(s.tokens for s in stats)
        for index, s in enumerate(stats):
            row = (str(index), f"{s.documents:,}", f"{s.tokens:,}", f"{100 * s.tokens / total:.1f} %")
            table.add_row(*row, ", ".join(fitted.top_terms[index][:8]))
        self._bars.console.print(table)

    # Uploads

    def _upload_folder(self, run_id: str, kind: ad.RunFileKind.ValueType, name: str) -> None:
        folder = self._work / name
        self._upload(run_id, kind, {spec.path: (folder / spec.path, spec) for spec in describe(folder)}, name)

    def _upload_shards(
        self, run_id: str, fitted: FitResult, shards: Sequence[ShardFile], stats: Sequence[ClusterStats]
    ) -> None:
        specs: dict[Path, FileSpec] = {}
        for shard in shards:
            size, digest = hash_file(shard.path)
            specs[shard.path] = FileSpec(path=f"{digest}.safetensors", size=size, sha256=digest)
        files = {spec.path: (path, spec) for path, spec in specs.items()}
        self._upload(run_id, ad.RUN_FILE_KIND_SHARD, files, "shards")
        new = [
            ad.NewCluster(
                index=index,
                documents=s.documents,
                top_terms=fitted.top_terms[index],
                example_documents=s.examples,
                shards=[
                    ad.NewShard(
                        split=pb.Split.Value(f"SPLIT_{shard.split}"),
                        ordinal=shard.ordinal,
                        file=specs[shard.path].to_proto(),
                        tokens=shard.tokens,
                        documents=shard.documents,
                    )
                    for shard in shards
                    if shard.cluster_index == index
                ],
            )
            for index, s in enumerate(stats)
        ]
        for start in range(0, len(new), _CLUSTER_BATCH):
            request = ad.RegisterClustersRequest(
                request_id=new_request_id(), run_id=run_id, clusters=new[start : start + _CLUSTER_BATCH]
            )
            self._connection.admin.RegisterClusters(request, timeout=600)

    def _upload(
        self, run_id: str, kind: ad.RunFileKind.ValueType, files: dict[str, tuple[Path, FileSpec]], name: str
    ) -> None:
        """Sends files in batches; a batch whose URLs expire under way is signed again and goes on."""
        bar = self._bars.add_task(f"uploading {name}", total=sum(spec.size for _, spec in files.values()))
        paths = list(files)
        with Transfer(base_url=self._connection.http_base) as transfer, ThreadPoolExecutor(_UPLOAD_THREADS) as pool:
            for start in range(0, len(paths), _UPLOAD_BATCH):
                left = {path: files[path] for path in paths[start : start + _UPLOAD_BATCH]}
                while left:
                    request = ad.PrepareRunUploadRequest(
                        request_id=new_request_id(),
                        run_id=run_id,
                        kind=kind,
                        files=[spec.to_proto() for _, spec in left.values()],
                    )
                    uploads = self._connection.admin.PrepareRunUpload(request).uploads
                    jobs = {u.file.path: pool.submit(transfer.upload, u, left[u.file.path][0]) for u in uploads}
                    for path, job in jobs.items():
                        with contextlib.suppress(UrlExpired):
                            job.result()
                            self._bars.advance(bar, left.pop(path)[1].size)


def _limited(texts: Sequence[str]) -> Iterator[str]:
    left = _TOKENIZER_CHARACTERS
    for text in texts:
        if left <= 0:
            return
        left -= len(text)
        yield text


@contextlib.contextmanager
def _work_dir(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="cbtm-run-") as made:
        yield Path(made)


def _bars(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
