"""The main job on what production runs on: PostgreSQL, an S3 store, and two coordinators that share both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

import cbtm
from cbtm_common.rpc import connect
from tests.support.postgres import PostgresServer, postgres
from tests.support.run_fixture import MODEL, RECIPE, _free_port, write_corpus, zygote
from tests.support.seaweed import Seaweed, seaweed
from tests.support.zygote import Child

__all__ = ["postgres", "seaweed"]
pytestmark = pytest.mark.integration


@pytest.fixture
def children() -> Iterator[list[Child]]:
    started: list[Child] = []
    yield started
    for child in reversed(started):
        child.kill()


def test_two_coordinators_one_registry_one_bucket(
    tmp_path: Path, postgres: PostgresServer, seaweed: Seaweed, children: list[Child]
) -> None:
    with psycopg.connect(postgres.url(), autocommit=True) as admin_connection:
        admin_connection.execute("CREATE DATABASE production")
    environment = {
        "CBTM_DATABASE_URL": postgres.url("production"),
        "CBTM_OBJECT_STORE": f"s3://{seaweed.make_bucket('production')}/cbtm",
        "CBTM_S3_ENDPOINT_URL": seaweed.endpoint_url,
        "CBTM_REAPER_SECONDS": "0.2",
        "CBTM_THREADS": "8",
        **seaweed.environment(),
    }

    def spawn(program: str, name: str, *arguments: str) -> Child:
        child = zygote().spawn(program, list(arguments), tmp_path / f"{name}.log", environment)
        children.append(child)
        return child

    first, second = tmp_path / "first", tmp_path / "second"
    init = spawn("cbtm-coord", "init", "init", "--data-dir", str(first))
    assert init.wait(60) == 0, init.output
    # What coordinators of one registry share: the signing key.
    second.mkdir()
    shutil.copy(first / "signing.key", second / "signing.key")
    shutil.copytree(first / "tls", second / "tls")
    targets = []
    for number, data in enumerate((first, second)):
        port = str(_free_port())
        serve = ("serve", "--data-dir", str(data), "--host", "127.0.0.1", "--port", port)
        child = spawn("cbtm-coord", f"serve-{number}", *serve)
        targets.append(f"127.0.0.1:{port}")
        with connect(targets[-1], token=(first / "join.token").read_text(), attempts=1) as probe:
            assert probe.wait_until_ready(30), child.output

    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    (tmp_path / "recipe.toml").write_text(RECIPE)
    admin, join = ((first / name).read_text().strip() for name in ("admin.token", "join.token"))
    create = ["run", "create", "--coordinator", targets[0], "--token", admin, "--name", "production", "--clusters", "2"]
    create += ["--corpus", str(write_corpus(tmp_path / "corpus.jsonl")), "--id-field", "id"]
    create += ["--from-scratch", str(tmp_path / "model.json"), "--recipe", str(tmp_path / "recipe.toml")]
    made = spawn("cbtm-coord", "create", *create)
    assert made.wait(120) == 0, made.output

    workers = []
    for number, target in enumerate(targets):
        arguments = ["join", "--coordinator", target, "--token", join, "--until-idle", "--device", "cpu"]
        arguments += ["--threads", "1", "--cache-dir", str(tmp_path / f"cache-{number}"), "--name", f"worker-{number}"]
        workers.append(spawn("cbtm-worker", f"worker-{number}", *arguments))
    for worker in workers:
        assert worker.wait(120) == 0, worker.output

    with cbtm.Ensemble.from_coordinator(
        targets[1], run="production", token=admin, top_k=2, cache_dir=tmp_path / "client"
    ) as model:
        assert len(model.clusters) == 2
        assert not model.missing_clusters
        assert float(model.perplexity(["She went to the village with her sister."])) > 1
        model.save(tmp_path / "ensemble")
    with cbtm.Ensemble.load(tmp_path / "ensemble", top_k=1) as alone:
        assert alone.generate("She", max_new_tokens=3).completion
    # Nothing of it lies in the coordinators' own folders.
    assert not list(first.glob("objects/**/*.safetensors"))
