"""`cbtm-coord run create`: from a corpus to an open run, and what is said and left behind when it cannot be made."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import catalog_service_pb2 as cs
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.ids import new_request_id
from cbtm_common.routing import LearnedRouter, load_router
from cbtm_common.shards import read_shard
from tests.support.run_fixture import MODEL, RECIPE, Site, template, write_corpus
from tests.support.zygote import Child

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """One coordinator for all; each test makes runs of its own names."""
    folder = tmp_path_factory.mktemp("create")
    shutil.copytree(template(), folder / "coordinator")
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "model.json").write_text(json.dumps(MODEL))
    write_corpus(folder / "corpus.jsonl")
    with Site(folder) as made:
        made.start_coordinator()
        yield made


def create(here: Site, name: str, *more: str, corpus: Path | None = None, clusters: int = 2, **changed: Any) -> Child:
    """`run create`, with its id field and tiny model."""
    recipe, model = (changed.get(n, here.folder / f"{n}.{e}") for n, e in (("recipe", "toml"), ("model", "json")))
    options = ["run", "create", "--data-dir", str(here.data), "--name", name, "--clusters", str(clusters)]
    options += ["--corpus", str(corpus or here.folder / "corpus.jsonl"), "--recipe", str(recipe)]
    return here.coord(*options, "--from-scratch", str(model), *more)


def runs(here: Site) -> dict[str, pb.Run]:
    return {run.name: run for run in here.connection.catalog.ListRuns(cs.ListRunsRequest()).runs}


def test_a_run_that_was_made_is_open_and_all_its_files_are_there(here: Site) -> None:
    made = create(here, "whole", "--id-field", "id", clusters=3)
    assert made.wait(120) == 0, made.output
    assert "whole is open to workers" in made.output
    run = runs(here)["whole"]
    assert run.state == pb.RUN_STATE_TRAINING
    clusters = here.connection.catalog.ListClusters(cs.ListClustersRequest(run="whole")).clusters
    assert [c.index for c in clusters] == [0, 1, 2]
    assert sum(c.documents for c in clusters) == 120
    assert all(c.top_terms and c.example_documents for c in clusters)
    shards = here.connection.catalog.ListShards(cs.ListShardsRequest(run="whole")).shards
    for shard in shards:
        opened = read_shard(here.data / "objects" / "objects" / shard.file.key)
        assert (len(opened.tokens), len(opened.document_offsets)) == (shard.tokens, shard.documents)
    assert sum(s.documents for s in shards) == 120
    splits = {(s.cluster_id, s.split) for s in shards}
    assert len(splits) == 6, "each cluster has something to train and to judge on"
    files = here.connection.catalog.GetRunFiles(cs.GetRunFilesRequest(run="whole"))
    clustering = (here.data / "objects" / "objects" / files.clustering_files[0].key).parent
    assert load_router(clustering).cluster_ids == tuple(c.id for c in clusters)


def test_the_same_corpus_made_again_is_stored_in_the_same_bytes(here: Site) -> None:
    shas = []
    for name in ("once", "twice"):
        made = create(here, name, "--id-field", "id")
        assert made.wait(120) == 0, made.output
        shards = here.connection.catalog.ListShards(cs.ListShardsRequest(run=name)).shards
        files = here.connection.catalog.GetRunFiles(cs.GetRunFilesRequest(run=name))
        shas.append(sorted(s.file.sha256 for s in shards) + sorted(f.sha256 for f in files.base_model_files))
    assert shas[0] == shas[1]


def test_a_run_with_a_learned_router_is_routed_by_it_and_sharded_by_its_centroids(here: Site, tmp_path: Path) -> None:
    recipe = tmp_path / "learned.toml"
    recipe.write_text((here.folder / "recipe.toml").read_text() + '\n[routing]\nrouter = "learned"\n')
    made = create(here, "learned", "--id-field", "id", recipe=recipe)
    assert made.wait(120) == 0, made.output
    files = here.connection.catalog.GetRunFiles(cs.GetRunFilesRequest(run="learned")).clustering_files
    folder = tmp_path / "router"
    for file in files:
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(here.data / "objects" / "objects" / file.key, folder / file.path)
    router = load_router(folder)
    assert isinstance(router, LearnedRouter)
    text = "It was the best of times"
    (routing,) = here.connection.catalog.Route(cs.RouteRequest(run="learned", texts=[text])).routings
    weights = {weight.cluster_id: weight.weight for weight in routing.weights}
    assert weights == pytest.approx(dict(zip(router.cluster_ids, router.weights([text])[0], strict=True)), abs=1e-6)
    plain = create(here, "by-centroid", "--id-field", "id")
    assert plain.wait(120) == 0, plain.output
    sizes = [
        [c.documents for c in here.connection.catalog.ListClusters(cs.ListClustersRequest(run=run)).clusters]
        for run in ("learned", "by-centroid")
    ]
    assert sizes[0] == sizes[1]


def test_one_cluster_is_a_run_too_and_a_baseline_stands_beside_it(here: Site) -> None:
    made = create(here, "single", "--baseline", clusters=1)
    assert made.wait(120) == 0, made.output
    assert runs(here)["single-dense"].state == pb.RUN_STATE_TRAINING
    status = here.connection.admin.GetRunStatus(ad.GetRunStatusRequest(run="single"))
    assert len(status.tasks) == 1


def test_bad_lines_are_counted_and_shown_and_the_rest_is_used(here: Site, tmp_path: Path) -> None:
    corpus = tmp_path / "some-bad.jsonl"
    shutil.copy(here.folder / "corpus.jsonl", corpus)
    with corpus.open("a") as file:
        file.write("nonsense\n" * 3)
    made = create(here, "some-bad", corpus=corpus)
    assert made.wait(120) == 0, made.output
    assert "3 bad line(s) are left out" in made.output
    report = here.connection.catalog.GetRunFiles(cs.GetRunFilesRequest(run="some-bad")).report_files
    said = json.loads((here.data / "objects" / "objects" / report[0].key).read_text())
    assert (said["documents"], said["bad_lines"]) == (120, 3)
    assert "121" in said["bad_line_samples"][0]["where"]


@pytest.mark.parametrize(
    ("more", "changes", "message"),
    [
        ((), {"clusters": 0}, "clusters"),
        ((), {"clusters": 500}, "clusters"),
        (("--sample", "1"), {}, "sample"),
        (("--text-field", "body"), {}, "text-field: no document has a field 'body'"),
        (("--id-field", "key"), {}, "id-field: no document has a field 'key'"),
        ((), {"corpus": Path("/nowhere/at/all.jsonl")}, "corpus: nothing readable"),
        ((), {"recipe": Path("/nowhere/recipe.toml")}, "recipe: there is no file"),
        ((), {"model": Path("/nowhere/model.json")}, "from-scratch: /nowhere/model.json"),
        (("--seed-model", "x"), {}, "seed-model"),
        (("--tokenizer", "/nowhere/tokenizer"), {}, "tokenizer"),
        (("--work-dir", "/dev/null/work"), {}, "work-dir: no folder can be made in /dev/null/work"),
        (("--resume-dir", "/dev/null/kept"), {}, "resume-dir: nothing can be written in /dev/null/kept"),
        ((), {"recipe": Path("/")}, "recipe: / cannot be read"),
    ],
    ids=str,
)
def test_what_cannot_be_made_is_refused_in_one_line_and_leaves_no_run(
    here: Site,
    more: tuple[str, ...],
    changes: dict[str, Any],
    message: str,
) -> None:
    before = set(runs(here))
    made = create(here, "impossible", *more, **changes)
    assert made.wait(120) in (1, 2)
    last = made.output.rstrip().rsplit("cbtm-coord: error: ", 1)[-1]
    assert message in last, made.output
    assert "Traceback" not in made.output
    assert set(runs(here)) == before


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("recipe", "sequence_length = 4096\n", "sequence_length"),
        ("recipe", "steps = 0\n", "steps"),
        ("recipe", "no = toml = at all", "is not TOML"),
        ("model", "{}", "model_type"),
        ("model", '{"model_type": "none-such"}', "from-scratch"),
        ("model", json.dumps({**MODEL, "vocab_size": 100}), "vocab_size 100 is under the 256 bytes"),
        ("model", json.dumps({**MODEL, "vocab_size": None}), "from-scratch"),
        ("model", json.dumps({**MODEL, "vocab_size": "many"}), "from-scratch"),
    ],
)
def test_a_recipe_or_model_that_does_not_fit_is_named_before_the_corpus_is_read(
    here: Site, tmp_path: Path, name: str, change: str, message: str
) -> None:
    path = tmp_path / "changed"
    path.write_text(change)
    made = create(here, "impossible", **{name: path})  # type: ignore[arg-type]
    assert made.wait(120) in (1, 2)
    assert message in made.output
    assert "Traceback" not in made.output
    assert "reading" not in made.output
    assert "impossible" not in runs(here)


def test_clusters_with_too_little_text_are_refused_and_nothing_is_left(here: Site, tmp_path: Path) -> None:
    corpus = tmp_path / "short.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"word{i} ship sea"}) + "\n" for i in range(12)))
    made = create(here, "short", corpus=corpus, clusters=4)
    assert made.wait(120) == 2, made.output
    assert "use fewer clusters" in made.output
    assert "short" not in runs(here)
    stored = [p for p in (here.data / "objects" / "objects").rglob("*") if p.is_file() and "runs/" in str(p)]
    known = {run.id for run in runs(here).values()}
    assert {p.relative_to(here.data / "objects" / "objects").parts[1] for p in stored} <= known


def test_a_name_that_is_taken_is_refused_and_the_run_is_left_alone(here: Site) -> None:
    made = create(here, "small")
    assert made.wait(120) in (1, 2)
    assert "small" in made.output
    assert runs(here)["small"].state == pb.RUN_STATE_TRAINING


def large(tmp_path: Path) -> Path:
    """Large enough that the draft is there for seconds."""
    return write_corpus(tmp_path / "large.jsonl", each=500, characters=4000)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_interrupts_it_leaves_no_half_made_run_and_no_files(
    here: Site, tmp_path: Path, signal_number: signal.Signals
) -> None:
    before = set(runs(here))
    made = create(here, "interrupted", "--work-dir", str(tmp_path / "work"), corpus=large(tmp_path))
    here.until(lambda: "interrupted" in runs(here), "the draft")
    made.send(signal_number)
    assert made.wait(60) == 130, made.output
    assert set(runs(here)) == before
    assert list((tmp_path / "work").iterdir()) == []


def test_the_next_one_removes_the_files_of_one_that_was_killed_and_says_what_to_do_with_its_draft(
    here: Site, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    made = create(here, "killed", "--work-dir", str(work), corpus=large(tmp_path))
    here.until(lambda: "killed" in runs(here), "the draft")
    here.until(lambda: any(path.is_file() for path in work.glob("*/**/*")), "a file")
    made.send(signal.SIGKILL)
    made.wait(60)
    left = set(work.iterdir())
    assert left
    refused = create(here, "killed", "--work-dir", str(work))
    assert refused.wait(120) == 1
    assert "cbtm-coord run delete killed" in refused.output
    here.connection.admin.DeleteRun(ad.DeleteRunRequest(request_id=new_request_id(), run="killed"))
    again = create(here, "killed", "--work-dir", str(work))
    assert again.wait(120) == 0, again.output
    assert "a killed `run create` had left" in again.output
    assert list(work.iterdir()) == []


def test_a_corpus_that_changes_between_its_passes_is_refused(here: Site, tmp_path: Path) -> None:
    corpus, kept = large(tmp_path), tmp_path / "kept"
    made = create(here, "changing", "--resume-dir", str(kept), corpus=corpus)
    here.until(lambda: list(kept.glob("changing/shards.progress/*.json")), "the second pass")
    with corpus.open("a") as file:
        file.write('{"text": "one more"}\n')
    assert made.wait(120) == 2, made.output
    assert re.search(r"corpus: 1 file\(s\) .*/large\.jsonl changed from [\d,]+ to [\d,]+ bytes", made.output), (
        made.output
    )
    assert "changing" not in runs(here)


def test_a_coordinator_that_is_restarted_in_the_middle_costs_nothing(here: Site, tmp_path: Path) -> None:
    work = tmp_path / "work"
    made = create(here, "patient", "--work-dir", str(work), corpus=large(tmp_path))
    here.until(lambda: "patient" in runs(here), "the draft")
    here.coordinator.send(signal.SIGKILL)
    here.coordinator.wait(60)
    # All is ready by then, and the upload begins.
    here.until(lambda: list(work.glob("*/report/report.json")), "the report")
    with socket.create_server(("127.0.0.1", here.port)) as nobody:
        nobody.settimeout(30)
        for _ in range(3):
            # gRPC tries again after a second, and then more.
            nobody.accept()[0].close()
    here.start_coordinator()
    assert made.wait(120) == 0, made.output
    assert runs(here)["patient"].state == pb.RUN_STATE_TRAINING


def test_a_corpus_of_which_nothing_is_good_is_refused_and_it_is_said_why(here: Site, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_bytes(f"Café {name}".encode("latin-1"))
    made = create(here, "latin", corpus=tmp_path)
    assert made.wait(120) == 2, made.output
    said = " ".join(made.output.split())
    assert "3 bad line(s) are left out" in said
    assert "is not UTF-8" in said
    assert "2 clusters cannot be made of 0 document(s)" in said
    assert "latin" not in runs(here)


def test_files_that_are_damaged_are_all_named_and_leave_no_run(here: Site, tmp_path: Path) -> None:
    whole = gzip.compress(large(tmp_path).read_bytes())
    for name, data in (("a", whole[:-2000]), ("b", whole), ("c", whole[:-3000])):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(data)
    made = create(here, "damaged", corpus=tmp_path / "*.gz")
    assert made.wait(120) == 2, made.output
    last = made.output.rstrip().rsplit("cbtm-coord: error: ", 1)[-1]
    assert re.search(r"corpus: 2 file\(s\) .*/a\.jsonl\.gz:\d+ cannot be read: .*/c\.jsonl\.gz:\d+ cannot", last), last
    assert "damaged" not in runs(here)
