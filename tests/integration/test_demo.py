"""The demo, much shortened: the same code, real processes, a smaller corpus and fewer steps."""

from __future__ import annotations

import gzip
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from examples.demo.__main__ import BASELINE, CLUSTERS, CORPUS, HERE, RUN, SENTENCES, run_demo
from examples.demo.processes import Processes, ProcessFailed

pytestmark = pytest.mark.integration

DOCUMENTS_OF_EACH_DOMAIN = 40
RECIPE = """
sequence_length = 32
global_batch = 4
steps = 80
precision = "fp32"
held_out_fraction = 0.2

[optimizer]
learning_rate = 5e-3

[seed_phase]
fraction = 0.5
global_batch = 8
warmup_steps = 5

[lease]
lease_seconds = 30
renew_seconds = 1
checkpoint_seconds = 30
"""


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    """Corpus, recipe and model of the short demo."""
    corpus = tmp_path / "corpus.jsonl"
    with corpus.open("w", encoding="utf-8") as file:
        for path in sorted(CORPUS.glob("*.jsonl.gz")):
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                for _, line in zip(range(DOCUMENTS_OF_EACH_DOMAIN), lines, strict=False):
                    document = json.loads(line)
                    file.write(json.dumps({"id": document["id"], "text": document["text"][:1500]}) + "\n")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    small = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = tmp_path / "model.json"
    model.write_text(json.dumps({**json.loads((HERE / "model.json").read_text()), **small}))
    return {"corpus": corpus, "recipe": recipe, "model": model}


# A dozen processes start one after another, each of which imports torch: slow where a machine has other work to do.
@pytest.mark.timeout(900)
def test_a_short_demo_trains_compares_and_leaves_an_ensemble_that_loads(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    out = tmp_path / "demo-out"
    with (tmp_path / "shown").open("w+") as shown:
        report = run_demo(out, str(inputs["corpus"]), inputs["recipe"], inputs["model"], Console(file=shown, width=100))
        shown.seek(0)
        text = shown.read()

    assert json.loads((out / "report.json").read_text("utf-8")) == report
    _check_perplexities(report)
    assert [r["text"] for r in report["routing"]] == list(SENTENCES)
    for routing in report["routing"]:
        assert sum(w["weight"] for w in routing["weights"]) == pytest.approx(1.0)
    assert report["sample"]["text"]
    assert 0 < report["seconds_until_trained"] < report["seconds"]
    for said in (f"{RUN}: COMPLETE", f"{BASELINE}: COMPLETE", "cbtm-worker join", "Try next"):
        assert said in text
    _check_the_saved_ensemble(out / "ensemble")


def _check_perplexities(report: dict[str, Any]) -> None:
    perplexity = report["perplexity"]
    assert set(perplexity) == {"seed", "dense", "expert", "top1", "top2", "all"}
    assert all(math.isfinite(value) and value > 1 for value in perplexity.values())
    assert [cluster["index"] for cluster in report["clusters"]] == list(range(CLUSTERS))
    # Each is judged by a handful of short documents, and a cluster's few may be strange to it.
    better = [cluster["perplexity"]["expert"] < cluster["perplexity"]["seed"] for cluster in report["clusters"]]
    assert sum(better) >= CLUSTERS - 1, report["clusters"]
    assert perplexity["expert"] < perplexity["seed"]
    assert perplexity["top2"] < perplexity["seed"]


def _check_the_saved_ensemble(folder: Path) -> None:
    """In a Python of its own, where nothing of the demo is loaded and no coordinator is named."""
    script = (
        "import sys, cbtm\n"
        "with cbtm.Ensemble.load(sys.argv[1], top_k=2) as model:\n"
        "    print(len(str(model.generate('The', max_new_tokens=4, seed=0))), len(model.clusters))\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("CBTM_")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    characters, clusters = done.stdout.split()
    assert int(characters) > 0
    assert int(clusters) == CLUSTERS


def test_a_folder_that_is_no_demo_result_is_left_alone(tmp_path: Path, inputs: dict[str, Path]) -> None:
    precious = tmp_path / "home" / "letter"
    precious.parent.mkdir()
    precious.write_text("dear")
    with pytest.raises(ProcessFailed, match="no result of the demo"):
        run_demo(precious.parent, str(inputs["corpus"]), inputs["recipe"], inputs["model"], Console(quiet=True))
    assert precious.read_text() == "dear"


def test_a_process_that_fails_shows_the_end_of_its_log_and_the_others_are_stopped(tmp_path: Path) -> None:
    running = Processes(tmp_path)
    running.run("init", ["cbtm-coord", "init", "--data-dir", str(tmp_path / "data")])
    serve = ["cbtm-coord", "serve", "--host", "127.0.0.1", "--port", "0", "--http-port", "0", "--data-dir"]
    with pytest.raises(ProcessFailed, match="bad ended with exit code") as failed, running as processes:
        _fail_beside_a_good_one(processes, serve, tmp_path)
    assert "nowhere" in str(failed.value)
    assert "stopping" in processes.tail("good")


def _fail_beside_a_good_one(processes: Processes, serve: list[str], folder: Path) -> None:
    processes.start("good", [*serve, str(folder / "data")])
    processes.wait_for_line("good", "cbtm-worker join")
    processes.start("bad", [*serve, str(folder / "nowhere")])
    processes.wait_for_line("bad", "cbtm-worker join")


def test_a_terminated_demo_stops_what_it_started(tmp_path: Path, inputs: dict[str, Path]) -> None:
    out = tmp_path / "demo-out"
    command = [sys.executable, "-m", "examples.demo", "--out", str(out), "--corpus", str(inputs["corpus"])]
    demo = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert demo.stdout is not None
    said = ""
    for line in demo.stdout:
        said += line
        if "2. a run" in line:
            break
    demo.send_signal(signal.SIGTERM)
    said += demo.communicate(timeout=60)[0]
    assert demo.returncode == 130, said
    assert "has ended" in said
    # The coordinator was asked to leave, and did.
    assert "stopping" in (out / "logs" / "coordinator.log").read_text()
