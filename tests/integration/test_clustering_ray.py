"""A run made on Ray: the same bytes as on this machine's own processes, and errors as they were raised."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cbtm_api.v1 import catalog_service_pb2 as cs
from cbtm_common.errors import Unavailable
from cbtm_coordinator.clustering.ray_engine import open_ray
from tests.support.run_fixture import MODEL, RECIPE, Site, template, write_corpus

pytest.importorskip("ray")
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A coordinator, and a corpus of three files."""
    folder = tmp_path_factory.mktemp("ray")
    shutil.copytree(template(), folder / "coordinator")
    (folder / "recipe.toml").write_text(RECIPE + '\n[routing]\nrouter = "learned"\n')
    (folder / "model.json").write_text(json.dumps(MODEL))
    lines = write_corpus(folder / "all.jsonl").read_text().splitlines(keepends=True)
    (folder / "corpus").mkdir()
    for number in range(3):
        (folder / "corpus" / f"{number}.jsonl").write_text("".join(lines[number::3]))
    with Site(folder) as made:
        made.start_coordinator()
        yield made


def made(here: Site, name: str, engine: str) -> dict[str, bytes]:
    """All files of a run of that name, as they are stored; its random id is taken out of them."""
    options = ["--name", name, "--clusters", "2", "--corpus", str(here.folder / "corpus"), "--engine", engine]
    options += ["--recipe", str(here.folder / "recipe.toml"), "--from-scratch", str(here.folder / "model.json")]
    create = here.coord("run", "create", "--data-dir", str(here.data), *options)
    assert create.wait(280) == 0, create.output
    catalog, objects = here.connection.catalog, here.data / "objects" / "objects"
    run = catalog.GetRun(cs.GetRunRequest(run=name)).run
    shards = catalog.ListShards(cs.ListShardsRequest(run=name)).shards
    found = {f"{s.split} {s.cluster_id} {s.ordinal}": objects / s.file.key for s in shards}
    (report,) = (objects / "runs" / run.id).glob("report/**/*.json")
    found |= {
        f"clustering {f.path}": objects / f.key
        for f in catalog.GetRunFiles(cs.GetRunFilesRequest(run=name)).clustering_files
    }
    found["report"] = report
    identity = run.id.encode()
    return {name.replace(run.id, "RUN"): path.read_bytes().replace(identity, b"RUN") for name, path in found.items()}


def test_a_run_made_on_ray_is_the_same_bytes_as_one_made_here(here: Site) -> None:
    local, ray = made(here, "local", "local"), made(here, "ray", "ray")
    assert len(local) >= 7, "shards of two clusters and splits, the routing model, the report"
    assert ray == local


def test_a_start_that_takes_too_long_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    left = [Exception("The current node timed out during startup.")] * 3

    def start(**_: object) -> None:
        if left:
            raise left.pop()

    monkeypatch.setattr(ray, "init", start)
    with pytest.raises(Unavailable, match="no Ray cluster can be used: The current node timed out"), open_ray():
        pass
    assert len(left) == 1
    with open_ray():
        assert not left


def test_a_cluster_that_is_not_there_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    asked = []

    def start(**_: object) -> None:
        asked.append(1)
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "init", start)
    with pytest.raises(Unavailable, match="no Ray cluster can be used: Could not find"), open_ray():
        pass
    assert asked == [1]


PROGRAM = """
from cbtm_common.errors import CbtmError, InvalidArgument
from cbtm_coordinator.clustering.ray_engine import open_ray

def pieces(source):
    yield from range(source * 3, source * 3 + 3)
    if source == 7:
        raise InvalidArgument("corpus: seven cannot be read", field="corpus")

def square(piece):
    if piece == 100:
        raise OSError(28, "full")
    return piece * piece

def main():
    with open_ray() as engine:
        print(list(engine.map(square, range(5), pieces)))
        print(list(engine.map(square, [], pieces)))
        for sources in ([6, 7, 8], [33]):
            got = []
            try:
                for answer in engine.map(square, sources, pieces):
                    got.append(answer)
            except (CbtmError, OSError) as error:
                print(got, type(error).__name__, error)

if __name__ == "__main__":
    main()
"""


def test_answers_come_in_order_and_what_is_raised_is_raised_here(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str([n * n for n in range(15)]),
        "[]",
        f"{[n * n for n in range(18, 24)]} InvalidArgument corpus: seven cannot be read",
        f"{[99 * 99]} OSError [Errno 28] full",
    ]
