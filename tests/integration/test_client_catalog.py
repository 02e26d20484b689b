"""The client against a real coordinator that serves a run which a real worker has trained, over gRPC and HTTP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cbtm._catalog import Catalog
from tests.integration.test_client_evaluation import invoke
from tests.support.ensembles import random_texts

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

RECIPE = """
sequence_length = 16
global_batch = 2
steps = 2
precision = "fp32"
held_out_fraction = 0.2
[lease]
lease_seconds = 20
renew_seconds = 2
"""
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}


def program(name: str) -> list[str]:
    package = {"cbtm": "cbtm._cli", "cbtm-coord": "cbtm_coordinator.cli", "cbtm-worker": "cbtm_worker.cli"}[name]
    return [sys.executable, "-c", f"import sys; sys.argv[0] = {name!r}; from {package} import main; main()"]


def call(name: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*program(name), *arguments], capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A coordinator with a complete run "tiny" of two clusters, its dense baseline, and "young" without any expert."""

    target: str
    admin_token: str
    cache: Path
    root: Path
    join_token: str

    @property
    def data(self) -> Path:
        return self.root / "data"

    def create(self, name: str, *options: str) -> None:
        create = ["run", "create", "--data-dir", str(self.data), "--corpus", str(self.root / "corpus.jsonl")]
        create += ["--clusters", "2", "--recipe", str(self.root / "recipe.toml")]
        call("cbtm-coord", *create, "--from-scratch", str(self.root / "model.json"), "--name", name, *options)

    def train(self, name: str, *, tasks: int | None = None) -> None:
        """So many tasks of the run, the seed's among them, or all that are open."""
        join = ["join", "--coordinator", self.target, "--token", self.join_token, "--run", name, "--until-idle"]
        join += ["--threads", "1", "--cache-dir", str(self.root / "worker")]
        call("cbtm-worker", *join, *([] if tasks is None else ["--max-tasks", str(tasks)]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainedRun]:
    root = tmp_path_factory.mktemp("run")
    data = root / "data"
    (root / "recipe.toml").write_text(RECIPE)
    (root / "model.json").write_text(json.dumps(MODEL))
    kinds = ("river stone window garden summer market", "theorem number matrix vector kernel compile")
    documents = [
        {"text": f"{kind} {text}"} for kind in kinds for text in random_texts(20, seed=len(kind), words=(20, 40))
    ]
    (root / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    call("cbtm-coord", "init", "--data-dir", str(data))
    serve = ["serve", "--data-dir", str(data), "--host", "127.0.0.1", "--port", "0", "--http-port", "0"]
    server = subprocess.Popen(
        [*program("cbtm-coord"), *serve],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        assert server.stdout is not None
        join_line = next(line for line in server.stdout if "cbtm-worker join" in line).split()
        token = join_line[join_line.index("--token") + 1]
        target = (data / "coordinator.address").read_text().strip()
        made = TrainedRun(
            target=target,
            admin_token=(data / "admin.token").read_text().strip(),
            cache=root / "client-cache",
            root=root,
            join_token=token,
        )
        made.create("tiny", "--baseline")
        for name in ("tiny", "tiny-dense"):
            made.train(name)
        made.create("young")
        with pytest.MonkeyPatch.context() as patched:
            # Who has no token to know the coordinator by.
            patched.setenv("CBTM_CA_FILE", str(data / "tls" / "ca.pem"))
            yield made
    finally:
        server.terminate()
        server.communicate(timeout=30)


def open_ensemble(run: TrainedRun, name: str = "tiny", **options: Any) -> Any:
    from cbtm import Ensemble

    return Ensemble.from_coordinator(run.target, run=name, cache_dir=run.cache, **options)


def test_a_run_is_opened_without_a_token_and_saved_to_a_folder_that_gives_the_same(
    run: TrainedRun, tmp_path: Path
) -> None:
    from cbtm import Ensemble, InvalidState

    texts = random_texts(4, seed=1)
    with open_ensemble(run) as model:
        assert [c.index for c in model.clusters] == [0, 1]
        assert model.missing_clusters == ()
        assert all(c.top_terms for c in model.clusters)
        assert model.routing.top_k == 2
        found = model.perplexity(texts)
        generated = model.generate(texts, max_new_tokens=4)
        model.save(tmp_path / "saved")
    closed = open_ensemble(run)
    closed.close()
    with pytest.raises(InvalidState, match="closed"):
        closed.score("river")
    with Ensemble.load(tmp_path / "saved") as again:
        assert again.perplexity(texts) == found
        assert again.generate(texts, max_new_tokens=4) == generated


def test_an_expert_is_fetched_only_when_it_is_needed(run: TrainedRun, tmp_path: Path) -> None:
    from cbtm import Ensemble

    with Ensemble.from_coordinator(run.target, run="tiny", cache_dir=tmp_path) as model:
        assert not list(tmp_path.rglob("model.safetensors"))
        model.with_routing(weights={model.clusters[1].id: 1.0}).score("river")
        assert len(list(tmp_path.rglob("model.safetensors"))) == 1


def test_an_evaluation_covers_the_held_out_shards_and_the_dense_baseline(run: TrainedRun) -> None:
    from cbtm import evaluate_run

    found = evaluate_run(run.target, run="tiny", token=run.admin_token, cache_dir=run.cache, top_k=[1, 2])
    assert set(found.perplexity) == {"seed", "dense", "expert", "top1", "top2", "all"}
    assert all(1 < value < 1e6 for value in found.perplexity.values())
    assert found.perplexity["top2"] == pytest.approx(found.perplexity["all"])
    assert [c.index for c in found.clusters] == [0, 1]
    assert sum(c.tokens for c in found.clusters) == found.tokens
    assert found.missing_clusters == ()
    less = evaluate_run(
        run.target, run="tiny", token=run.admin_token, cache_dir=run.cache, baseline=None, max_tokens_per_cluster=1
    )
    assert [c.documents for c in less.clusters] == [1, 1]
    assert "dense" not in less.perplexity


def test_an_evaluation_for_choices_is_of_other_documents_than_a_reported_one(run: TrainedRun) -> None:
    from cbtm import evaluate_run

    common: dict[str, Any] = {"run": "tiny", "token": run.admin_token, "cache_dir": run.cache, "baseline": None}
    test = evaluate_run(run.target, **common)
    validation = evaluate_run(run.target, split="validation", **common)
    assert (test.split, validation.split) == ("test", "validation")
    with Catalog(run.target, run="tiny", token=run.admin_token, cache_dir=run.cache) as catalog:
        shards = catalog.held_out(split="test"), catalog.held_out(split="validation")
    assert [len(documents) for documents in shards] == [test.documents, validation.documents]
    assert not set(shards[0]) & set(shards[1])
    source = ["--coordinator", run.target, "--run", "tiny", "--token", run.admin_token, "--cache-dir", str(run.cache)]
    printed = json.loads(invoke("eval", *source, "--split", "validation", "--baseline", "none", "--json"))
    assert printed["split"] == "validation"
    assert printed["perplexity"] == pytest.approx(validation.perplexity, rel=1e-5)
    assert validation.perplexity["all"] != pytest.approx(test.perplexity["all"], rel=1e-5)


def test_a_calibration_is_stored_with_the_run_and_taken_up_by_whoever_opens_it(run: TrainedRun) -> None:
    from cbtm import PermissionDenied, calibrate_run

    source = ["--coordinator", run.target, "--run", "tiny", "--cache-dir", str(run.cache), "--token", run.admin_token]
    with open_ensemble(run) as model:
        before = model.routing
    dry = json.loads(invoke("calibrate", *source, "--dry-run", "--json"))
    assert not dry["stored"]
    with open_ensemble(run) as model:
        assert model.routing == before
    shown = invoke("calibrate", *source, "--top-k", "1")
    assert "stored top-1" in shown
    assert "once after 16" in shown
    try:
        with open_ensemble(run) as model:
            chosen = model.parts.calibrated
            assert chosen is not None
            assert (chosen.top_k, model.routing.top_k) == (1, 1)
            assert model.routing.temperature == chosen.temperature
            assert model.routing.settle_after == chosen.settle_after
        with Catalog(run.target, run="tiny", token=run.admin_token, cache_dir=run.cache) as catalog:
            documents = catalog.held_out(split="validation")
        assert (chosen.documents, chosen.tokens) == (len(documents), sum(len(d.token_ids) for d in documents))
    finally:
        invoke("calibrate", *source, "--reset")
    with open_ensemble(run) as model:
        assert model.routing == before
    made = call("cbtm-coord", "token", "create", "--role", "consumer", "--data-dir", str(run.data), "--json").stdout
    with pytest.raises(PermissionDenied):
        calibrate_run(run.target, run="tiny", token=json.loads(made)["secret"], cache_dir=run.cache)


def test_the_baseline_opens_as_an_ensemble_of_one(run: TrainedRun) -> None:
    with open_ensemble(run, "tiny-dense") as model:
        assert [w.weight for w in model.route("theorem").weights] == [1.0]
        assert model.perplexity("theorem matrix").perplexity > 1


def test_shards_are_not_for_everybody(run: TrainedRun) -> None:
    from cbtm import PermissionDenied, evaluate_run

    with pytest.raises(PermissionDenied):
        evaluate_run(run.target, run="tiny", cache_dir=run.cache)


def test_a_run_without_experts_says_how_far_it_is(run: TrainedRun) -> None:
    from cbtm import InvalidState

    with pytest.raises(InvalidState, match=r"run young: 0 of 2 experts are finished \(the run is SEEDING\)"):
        open_ensemble(run, "young")


def test_a_run_that_does_not_exist_is_named(run: TrainedRun) -> None:
    from cbtm import NotFound

    with pytest.raises(NotFound, match="nope"):
        open_ensemble(run, "nope")


def test_a_damaged_cached_file_is_fetched_anew(run: TrainedRun, tmp_path: Path) -> None:
    from cbtm import Ensemble

    with Ensemble.from_coordinator(run.target, run="tiny", cache_dir=tmp_path, top_k="all") as model:
        expected = model.score("river stone")
    for path in (tmp_path / "files" / "sha256").glob("*/*"):
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with Ensemble.from_coordinator(run.target, run="tiny", cache_dir=tmp_path, top_k="all") as model:
        assert model.score("river stone") == expected


def test_the_commands_do_what_the_library_does(run: TrainedRun, tmp_path: Path) -> None:

    saved = str(tmp_path / "saved")
    source = ["--coordinator", run.target, "--run", "tiny", "--cache-dir", str(run.cache)]
    shown = invoke("eval", *source, "--token", run.admin_token, "--output", str(tmp_path / "report.json"))
    assert "dense baseline" in shown
    assert json.loads((tmp_path / "report.json").read_text())["perplexity"]["top1"] > 1
    assert "2 experts" in invoke("save", saved, *source)
    routed = json.loads(invoke("route", "theorem", "-e", saved, "--json"))
    assert sum(weight["weight"] for weight in routed[0]["weights"]) == pytest.approx(1)
    assert "theorem" in invoke("route", "theorem", "-e", saved)
    assert len(json.loads(invoke("generate", "river", "-e", saved, "-n", "3", "--json"))["token_ids"]) <= 3


def test_the_program_tells_an_error_in_one_line_and_by_its_exit_code(run: TrainedRun, tmp_path: Path) -> None:
    wrong = call("cbtm", "generate", "river", "-e", str(tmp_path), check=False)
    assert wrong.returncode == 1
    assert wrong.stderr == f"cbtm: error: {tmp_path} is no saved ensemble: it has no cbtm.json\n"
    assert call("cbtm", "route", "x", "--top-k", "two", "-e", str(tmp_path), check=False).returncode == 2


def test_a_live_ensemble_takes_up_what_the_coordinator_accepts_and_drops_what_it_withdraws(run: TrainedRun) -> None:
    import sqlite3

    from cbtm import ExpertChanges, InvalidState

    run.create("live")
    run.train("live", tasks=2)
    with open_ensemble(run, "live", top_k="all") as model:
        first, missing = model.clusters[0].id, model.missing_clusters[0]
        assert len(model.clusters) == 1
        assert not model.refresh()
        run.train("live")
        assert model.refresh() == ExpertChanges(added=(missing,))
        assert [w.weight > 0 for w in model.route("theorem").weights] == [True, True]
        assert model.score("river stone").log_prob < 0
        both = model.score("river stone")
        call("cbtm-coord", "cluster", "requeue", "0", "--from-start", "--run", "live", "--data-dir", str(run.data))
        run.train("live")
        assert model.refresh() == ExpertChanges(replaced=(model.clusters[0].id,))
        assert model.score("river stone").log_prob == pytest.approx(both.log_prob, abs=1e-5)
        with sqlite3.connect(run.data / "registry.db") as registry:
            registry.execute("DELETE FROM experts WHERE run_id = ? AND cluster_index = 0", (model.parts.run_id,))
        gone = model.refresh().removed
        assert gone == (min(first, missing),)
        assert model.missing_clusters == gone
        score = model.score("river stone")
        with sqlite3.connect(run.data / "registry.db") as registry:
            registry.execute("DELETE FROM experts WHERE run_id = ?", (model.parts.run_id,))
        with pytest.raises(InvalidState, match="0 of 2 experts"):
            model.refresh()
        assert model.score("river stone") == score
