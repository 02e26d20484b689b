"""Makes a run from a corpus: clusters, shards and uploads it, then opens it. Runs where the corpus is.

A client of AdminService: nothing but the run's files goes to the coordinator's object store, by signed URLs. What costs
least is checked first: options, name, the beginnings of all files, the recipe; then the seed model; only then is the
whole corpus read. If it fails once the draft is made, or is interrupted, the draft is deleted again. Memory stays
bounded whatever the corpus: the sample, one batch of documents, and the seed model while it loads.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.cli import human_bytes
from cbtm_common.errors import AlreadyExists, CbtmError, InvalidArgument, NotFound, ResourceExhausted
from cbtm_common.files import FileSpec, describe, hash_file, is_disk_full
from cbtm_common.ids import cluster_id, new_request_id
from cbtm_common.recipe import Recipe, RouterKind
from cbtm_common.rpc import Connection
from cbtm_coordinator.clustering import seed_model, tokenizer
from cbtm_coordinator.clustering.corpus import Corpus, Document, ReadReport, open_corpus
from cbtm_coordinator.clustering.engine import Engine, EngineName, open_engine
from cbtm_coordinator.clustering.fit import FitResult, fit
from cbtm_coordinator.clustering.learn import LearnResult, learn_router
from cbtm_coordinator.clustering.pool import cores
from cbtm_coordinator.clustering.progress import ClusterStats, ShardFile
from cbtm_coordinator.clustering.report import write_report
from cbtm_coordinator.clustering.sample import reservoir
from cbtm_coordinator.clustering.sharding import TRAIN, shard_corpus
from cbtm_coordinator.create_run_display import cluster_table, progress_bars, show_steps
from cbtm_coordinator.lifecycle import Verification
from cbtm_coordinator.upload_run import Files, patiently, register_clusters, upload_files
from cbtm_coordinator.work_dir import remove_abandoned, work_dir

# Tokenizer training reads at most this much of the sample: BPE merges settle long before.
_TOKENIZER_CHARACTERS = 50_000_000
# From so many bytes on, a corpus is worked on by a process for every core.
_MANY_BYTES = 20_000_000
_FOLDERS = (
    (ad.RUN_FILE_KIND_CLUSTERING, "clustering"),
    (ad.RUN_FILE_KIND_TOKENIZER, "tokenizer"),
    (ad.RUN_FILE_KIND_BASE_MODEL, "base"),
    (ad.RUN_FILE_KIND_REPORT, "report"),
)


@dataclass(frozen=True, kw_only=True)
class CreateRunOptions:
    """What `cbtm-coord run create` was told. Exactly one of `seed_model` and `from_scratch` is set.

    `work_dir` is where the temporary folder is made, which takes up to about twice the corpus as token ids. With
    `resume_dir` the shards are made there instead, in a folder of the run's name: if the command is killed, the same
    one goes on with them, and the folder is deleted once the run is made.
    """

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
    resume_dir: Path | None = None
    engine: EngineName = EngineName.LOCAL
    verification: Verification = Verification.OFF


def create_run(connection: Connection, options: CreateRunOptions, console: Console) -> dict[str, Any]:
    """Names and ids of the run made, and of its baseline. Raises CbtmError, and leaves no unfinished run behind."""
    _check_options(options)
    _check_name_free(connection, options.name)
    corpus = open_corpus(options.corpus, text_field=options.text_field, id_field=options.id_field)
    if freed := remove_abandoned(options.work_dir):
        console.print(f"{human_bytes(freed)} that a killed `run create` had left are removed")
    # Starting processes takes longer than a small corpus.
    processes = cores() if corpus.total_bytes >= _MANY_BYTES else 1
    with (
        work_dir(options.work_dir) as work,
        open_engine(options.engine, processes=processes) as engine,
        progress_bars(console) as bars,
    ):
        bars.console.print(f"{len(corpus.files)} file(s), {human_bytes(corpus.total_bytes)}")
        maker = _Maker(connection, options, corpus, work, engine, bars)
        maker.check_config()
        request = ad.CreateRunRequest(
            request_id=new_request_id(),
            name=options.name,
            cluster_count=options.clusters,
            recipe_json=options.recipe.to_json(),
            from_scratch=options.from_scratch is not None,
            verification=pb.Verification.Value(f"VERIFICATION_{options.verification}"),
        )
        run = connection.admin.CreateRun(request).run
        try:
            maker.load_models()
            maker.read_sample()
            maker.build(run)
        except BaseException:
            _discard(connection, run, bars.console)
            raise
    if options.resume_dir is not None:
        # The run is open: what cannot be deleted is no reason to say that it is not.
        shutil.rmtree(options.resume_dir / options.name, ignore_errors=True)
    made: dict[str, Any] = {"run": run.name, "id": run.id}
    if options.baseline:
        baseline = ad.CreateBaselineRequest(request_id=new_request_id(), run=run.id)
        made["baseline"] = patiently(lambda: connection.admin.CreateBaseline(baseline)).run.name
    console.print(
        f"[bold]{run.name}[/] is open to workers; watch it with [bold]cbtm-coord status {run.name} --watch[/]"
    )
    return made


def _check_options(options: CreateRunOptions) -> None:
    if options.clusters < 1:
        raise InvalidArgument(f"clusters: {options.clusters} is not at least 1", field="clusters")
    if options.sample_documents < options.clusters:
        raise InvalidArgument(
            f"sample: {options.sample_documents} document(s) are fewer than {options.clusters} clusters", field="sample"
        )
    if options.resume_dir is not None:
        try:
            options.resume_dir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=options.resume_dir).close()
        except OSError as error:
            raise InvalidArgument(
                f"resume-dir: nothing can be written in {options.resume_dir}: {error.strerror}", field="resume-dir"
            ) from error


def _check_name_free(connection: Connection, name: str) -> None:
    """Asked before the corpus is looked at; that the caller is an administrator comes out here too."""
    try:
        run = connection.admin.GetRunStatus(ad.GetRunStatusRequest(run=name)).run
    except NotFound:
        return
    if run.state == pb.RUN_STATE_DRAFT:
        raise AlreadyExists(
            f"name: {name!r} is a run that is still being made, or was left half made; choose another name, or delete "
            f"it with `cbtm-coord run delete {name}`"
        )
    raise AlreadyExists(f"name: there is a run {name!r} already; choose another, or delete it first")


def _discard(connection: Connection, run: pb.Run, console: Console) -> None:
    try:
        connection.admin.DeleteRun(ad.DeleteRunRequest(request_id=new_request_id(), run=run.id))
    except CbtmError as error:
        console.print(
            f"[yellow]the unfinished run is still there[/] ({escape(error.message)}): "
            f"delete it with [bold]cbtm-coord run delete {run.name}[/]"
        )


class _Maker:
    """The steps of making one run, sharing its files and progress bars."""

    def __init__(
        self,
        connection: Connection,
        options: CreateRunOptions,
        corpus: Corpus,
        work: Path,
        engine: Engine,
        bars: Progress,
    ) -> None:
        self._connection = connection
        self._options = options
        self._recipe = options.recipe
        self._corpus = corpus
        self._work = work
        self._shards = (work if options.resume_dir is None else options.resume_dir / options.name) / "shards"
        self._bars = bars
        self._read = ReadReport()
        self._sample: list[str] = []
        self._engine = engine
        self._base: seed_model.BaseModel | None = None
        self._tokens: Any = None

    def check_config(self) -> None:
        """The model from scratch, as far as its config says. Raises InvalidArgument."""
        config_path = self._options.from_scratch
        if config_path is not None:
            planned = seed_model.check_config(config_path)
            seed_model.check_fit(planned, sequence_length=self._recipe.sequence_length, tokenizer_size=0)
            if self._options.tokenizer is None:
                tokenizer.check_vocab_size(planned.vocab_size)

    def load_models(self) -> None:
        """All of the seed model and the tokenizer that does not need the corpus. Raises InvalidArgument."""
        bar = self._bars.add_task("seed model and tokenizer", total=1)
        options = self._options
        source = options.tokenizer
        if options.from_scratch is None:
            location = str(options.seed_model)
            if location.startswith("s3://"):
                location = str(seed_model.fetch_prefix(location, self._work / "download"))
            self._base = seed_model.load_pretrained(location, self._work / "base")
            source = source or location
        if source is not None:
            self._tokens = tokenizer.load_tokenizer(source, self._work / "tokenizer")
        if self._base is not None:
            seed_model.check_fit(
                self._base, sequence_length=self._recipe.sequence_length, tokenizer_size=len(self._tokens)
            )
        self._bars.advance(bar)

    def read_sample(self) -> None:
        """The first pass: counts documents, draws the sample. Raises InvalidArgument for too few."""
        bar = self._bars.add_task("reading", total=self._corpus.total_bytes, unit="bytes")
        documents = self._corpus.documents(self._read, on_bytes=lambda count: self._bars.advance(bar, count))
        self._sample = reservoir(documents, size=self._options.sample_documents, seed=self._recipe.seed)
        read, clusters = self._read, self._options.clusters
        read.check_whole()
        if read.bad_lines:
            first = escape(f"{read.samples[0].where}: {read.samples[0].why}")
            self._bars.console.print(
                f"[yellow]{read.bad_lines:,} bad line(s) are left out[/], the first: {first}", highlight=False
            )
        if read.documents < clusters:
            raise InvalidArgument(
                f"clusters: {clusters} clusters cannot be made of {read.documents} document(s)", field="clusters"
            )

    def build(self, run: pb.Run) -> None:
        base, tokens = self._models()
        fitted = self._fit(run.id)
        learned = self._learn(fitted)
        self._sample = []
        shards, stats = self._shard(fitted, tokens)
        self._check_shards(shards, stats)
        (learned.router if learned else fitted.router).save(self._work / "clustering")
        write_report(
            self._work / "report" / "report.json",
            corpus=self._corpus,
            read=self._read,
            fitted=fitted,
            learned=learned,
            shards=shards,
            stats=stats,
        )
        self._bars.console.print(cluster_table(fitted, stats))
        for kind, name in _FOLDERS:
            folder = self._work / name
            self._upload(run.id, kind, {spec.path: (folder / spec.path, spec) for spec in describe(folder)}, name)
        self._register(run.id, fitted, shards, stats)
        start = ad.StartRunRequest(
            request_id=new_request_id(),
            run_id=run.id,
            model_parameters=base.parameters,
            trained_parameters_json=json.dumps(base.trained) if base.trained is not None else "",
        )
        patiently(lambda: self._connection.admin.StartRun(start, timeout=600))

    def _models(self) -> tuple[seed_model.BaseModel, Any]:
        """The base model and the tokenizer, both saved in the work folder; made here when from scratch."""
        if self._base is not None:
            return self._base, self._tokens
        config_path = self._options.from_scratch
        assert config_path is not None
        if self._tokens is None:
            bar = self._bars.add_task("training the tokenizer", total=1)
            fields = seed_model.read_config(config_path)
            self._tokens = tokenizer.train_tokenizer(
                _limited(self._sample),
                self._work / "tokenizer",
                vocab_size=int(fields.get("vocab_size", tokenizer.DEFAULT_VOCAB_SIZE)),
                context=self._recipe.sequence_length,
            )
            self._bars.advance(bar)
        self._base = seed_model.from_scratch(
            config_path,
            self._work / "base",
            seed=self._recipe.seed,
            vocab_size=len(self._tokens),
            eos_token_id=int(self._tokens.eos_token_id),
        )
        return self._base, self._tokens

    def _fit(self, run_id: str) -> FitResult:
        bar, report = show_steps(self._bars, "clustering")
        fitted = fit(
            self._sample,
            [cluster_id(run_id, index) for index in range(self._options.clusters)],
            seed=self._recipe.seed,
            engine=self._engine,
            report=report,
        )
        self._bars.update(bar, description="clustering", total=1, completed=1)
        return fitted

    def _learn(self, fitted: FitResult) -> LearnResult | None:
        if self._recipe.routing.router is not RouterKind.LEARNED or self._options.clusters == 1:
            return None
        bar, report = show_steps(self._bars, "router")
        learned = learn_router(fitted.router, self._sample, seed=self._recipe.seed, report=report)
        self._bars.update(bar, description="router", total=1, completed=1)
        return learned

    def _shard(self, fitted: FitResult, tokens: Any) -> tuple[list[ShardFile], list[ClusterStats]]:
        bar = self._bars.add_task("assigning and tokenizing", total=self._read.documents)
        try:
            return shard_corpus(
                [partial(_read_again, replace(self._corpus, files=(file,))) for file in self._corpus.files],
                fitted.router,
                tokens,
                self._shards,
                held_out_fraction=self._recipe.held_out_fraction,
                inputs=repr(self._corpus),
                engine=self._engine,
                on_documents=lambda count: self._bars.advance(bar, count),
            )
        except OSError as error:
            if self._options.resume_dir is not None and is_disk_full(error):
                raise ResourceExhausted(
                    f"resume-dir: the disk of {self._options.resume_dir} is full; make room there, and give the same "
                    "command again"
                ) from error
            raise

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

    def _upload(self, run_id: str, kind: ad.RunFileKind.ValueType, files: Files, name: str) -> None:
        size = sum(spec.size for _, spec in files.values())
        bar = self._bars.add_task(f"uploading {name}", total=size, unit="bytes")
        upload_files(self._connection, run_id, kind, files, on_bytes=lambda count: self._bars.advance(bar, count))

    def _register(
        self, run_id: str, fitted: FitResult, shards: Sequence[ShardFile], stats: Sequence[ClusterStats]
    ) -> None:
        specs: dict[Path, FileSpec] = {}
        for shard in shards:
            size, digest = hash_file(shard.path)
            specs[shard.path] = FileSpec(path=f"{digest}.safetensors", size=size, sha256=digest)
        files = {spec.path: (path, spec) for path, spec in specs.items()}
        self._upload(run_id, ad.RUN_FILE_KIND_SHARD, files, "shards")
        of_cluster: dict[int, list[ad.NewShard]] = {}
        for shard in shards:
            new = ad.NewShard(
                split=pb.Split.Value(f"SPLIT_{shard.split}"),
                ordinal=shard.ordinal,
                file=specs[shard.path].to_proto(),
                tokens=shard.tokens,
                documents=shard.documents,
            )
            of_cluster.setdefault(shard.cluster_index, []).append(new)
        clusters = [
            ad.NewCluster(
                index=index,
                documents=s.documents,
                top_terms=fitted.top_terms[index],
                example_documents=s.examples,
                shards=of_cluster[index],
            )
            for index, s in enumerate(stats)
        ]
        register_clusters(self._connection, run_id, clusters)


def _read_again(corpus: Corpus) -> Iterator[Document]:
    """One file's. Ends with an error, before the next is begun, when it is not what it was in the first pass."""
    report = ReadReport()
    yield from corpus.documents(report)
    report.check_whole()


def _limited(texts: Sequence[str]) -> Iterator[str]:
    left = _TOKENIZER_CHARACTERS
    for text in texts:
        if left <= 0:
            return
        left -= len(text)
        yield text
