"""The second pass over a corpus, killed again and again: the same shards come out, whatever the number of processes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import catalog_service_pb2 as cs
from cbtm_common.ids import new_request_id
from cbtm_common.routing import load_router
from cbtm_coordinator.clustering.corpus import ReadReport, open_corpus
from cbtm_coordinator.clustering.fit import fit
from cbtm_coordinator.clustering.tokenizer import train_tokenizer
from tests.support.run_fixture import MODEL, RECIPE, Site, template, write_corpus
from tests.support.zygote import Child

pytestmark = pytest.mark.integration

CORPUS = Path(__file__).parents[2] / "examples" / "corpus"
# In a process of its own: shards the files of FOLDER into OUTPUT on so many processes.
PROGRAM = """
import sys
from functools import partial
from pathlib import Path
from tokenizers import Tokenizer
from cbtm_common.routing import load_router
from cbtm_coordinator.clustering import sharding
from cbtm_coordinator.clustering.corpus import ReadReport, open_corpus
from cbtm_coordinator.clustering.engine import Local

class Plain:
    eos_token_id = 0
    def __init__(self, path):
        self.backend_tokenizer = Tokenizer.from_file(path)
    def __len__(self):
        return self.backend_tokenizer.get_vocab_size()

def main(folder, output, processes):
    sharding._BATCH_DOCUMENTS, sharding._RECORD_CHARACTERS = 20, 50_000
    files = [partial(open_corpus([str(p)]).documents, ReadReport()) for p in sorted(Path(folder, "corpus").iterdir())]
    sharding.shard_corpus(
        files, load_router(Path(folder, "router")), Plain(str(Path(folder, "tokenizer", "tokenizer.json"))),
        Path(output), held_out_fraction=0.1, engine=Local(int(processes)),
    )

if __name__ == "__main__":
    main(*sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of six files, a router and a tokenizer for it, and the program."""
    made = tmp_path_factory.mktemp("killed")
    texts = [d.text[:3000] for d in open_corpus([str(CORPUS)]).documents(ReadReport())][::2]
    (made / "corpus").mkdir()
    for number in range(6):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[number::6]]
        (made / "corpus" / f"{number}.jsonl").write_text("".join(lines))
    fit(texts[::4], [f"r-c{i:04d}" for i in range(4)], seed=0, temperature=0.1).router.save(made / "router")
    train_tokenizer(texts[:50], made / "tokenizer", vocab_size=1000, context=64)
    (made / "program.py").write_text(PROGRAM)
    return made


def begin(folder: Path, output: Path, processes: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, str(folder / "program.py"), str(folder), str(output), str(processes)])


def shards(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir()}


def test_killed_at_any_time_and_on_any_number_of_processes_it_makes_the_same_shards(
    folder: Path, tmp_path: Path
) -> None:
    assert begin(folder, tmp_path / "calm", 1).wait(120) == 0
    output = tmp_path / "shards"
    record = tmp_path / "shards.progress" / "position.json"
    places = []
    for processes in (2, 1, 3):
        before = record.read_bytes() if record.exists() else b""
        with begin(folder, output, processes) as running:
            while running.poll() is None and (not record.exists() or record.read_bytes() == before):
                time.sleep(0.002)
            running.kill()
        assert running.returncode == -9, "it was done before it could be killed"
        said = json.loads(record.read_text())
        places.append((said["file"], said["document"]))
    assert places == sorted(set(places)), "each process goes on where the one before was"
    assert begin(folder, output, 2).wait(120) == 0
    assert shards(output) == shards(tmp_path / "calm")
    assert len(load_router(folder / "router").cluster_ids) * 2 == len(shards(output))


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("resume")
    shutil.copytree(template(), folder / "coordinator")
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "model.json").write_text(json.dumps(MODEL))
    write_corpus(folder / "corpus.jsonl", each=300, characters=3000)
    with Site(folder) as made:
        made.start_coordinator()
        yield made


def create(here: Site, name: str, *more: str) -> Child:
    options = ["--data-dir", str(here.data), "--name", name, "--clusters", "2", "--corpus"]
    options += [str(here.folder / "corpus.jsonl"), "--recipe", str(here.folder / "recipe.toml")]
    return here.coord("run", "create", *options, "--from-scratch", str(here.folder / "model.json"), *more)


def stored(here: Site, name: str) -> list[str]:
    shards = here.connection.catalog.ListShards(cs.ListShardsRequest(run=name)).shards
    return sorted(shard.file.sha256 for shard in shards)


def test_the_command_that_was_killed_is_given_again_and_makes_the_run(here: Site, tmp_path: Path) -> None:
    calm = create(here, "calm")
    assert calm.wait(120) == 0, calm.output
    options = ("--resume-dir", str(tmp_path))
    killed = create(here, "killed", *options)
    here.until(lambda: (tmp_path / "killed" / "shards.progress" / "inputs.json").exists(), "the second pass")
    killed.kill()
    here.connection.admin.DeleteRun(ad.DeleteRunRequest(request_id=new_request_id(), run="killed"))
    again = create(here, "killed", *options)
    assert again.wait(120) == 0, again.output
    assert stored(here, "killed") == stored(here, "calm")
    assert list(tmp_path.iterdir()) == []
