"""`cbtm-coord run create` from models that exist: a folder, a prefix in an object store; and what cannot be a seed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cbtm_api.v1 import catalog_service_pb2 as cs
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.errors import InvalidArgument, ResourceExhausted
from cbtm_common.files import hash_file
from cbtm_coordinator.clustering import seed_model, tokenizer
from tests.support.coordinator import RunningCoordinator, running_coordinator
from tests.support.models import make_tiny_model, make_tiny_tokenizer
from tests.support.run_fixture import RECIPE, write_corpus
from tests.support.seaweed import Seaweed, seaweed

pytestmark = pytest.mark.integration
__all__ = ["seaweed"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCoordinator]:
    with running_coordinator(tmp_path_factory.mktemp("seeds")) as made:
        yield made


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a recipe, and a whole model with its tokenizer in `model/`."""
    folder = tmp_path_factory.mktemp("files")
    write_corpus(folder / "corpus.jsonl")
    (folder / "recipe.toml").write_text(RECIPE)
    make_tiny_model(folder / "model", vocab_size=300)
    texts = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()]
    make_tiny_tokenizer(folder / "model", texts, vocab_size=300)
    return folder


def arguments(files: Path, name: str, seed: str) -> list[str]:
    create = ["run", "create", "--name", name, "--clusters", "2", "--seed-model", seed]
    return [
        *create,
        "--corpus",
        str(files / "corpus.jsonl"),
        "--recipe",
        str(files / "recipe.toml"),
        "--id-field",
        "id",
    ]


def weights_of(here: RunningCoordinator, run: str) -> str:
    """SHA-256 of the model that the run's experts branch from."""
    with here.connect(here.token("admin")) as connection:
        found = connection.catalog.GetRunFiles(cs.GetRunFilesRequest(run=run)).base_model_files
    return next(file.sha256 for file in found if file.path == "model.safetensors")


def test_a_run_from_a_folder_trains_experts_at_once_from_its_very_weights(
    here: RunningCoordinator, files: Path
) -> None:
    made = here.coord(*arguments(files, "folder", str(files / "model")))
    assert made.returncode == 0, made.stderr
    assert weights_of(here, "folder") == hash_file(files / "model" / "model.safetensors")[1]
    with here.connect(here.token("admin")) as connection:
        run = connection.catalog.GetRun(cs.GetRunRequest(run="folder")).run
    assert run.state == pb.RUN_STATE_TRAINING


def test_a_run_from_a_prefix_of_an_object_store_has_the_same_weights(
    here: RunningCoordinator, files: Path, seaweed: Seaweed
) -> None:
    client, bucket = seaweed.client(), seaweed.make_bucket("models")
    for path in (files / "model").iterdir():
        client.upload_file(str(path), bucket, f"zoo/tiny/{path.name}")
    client.put_object(Bucket=bucket, Key="zoo/tiny-other/config.json", Body=b"not this one")
    env = {**seaweed.environment(), "AWS_ENDPOINT_URL": seaweed.endpoint_url, "AWS_DEFAULT_REGION": "us-east-1"}
    made = here.coord(*arguments(files, "prefix", f"s3://{bucket}/zoo/tiny"), env=env)
    assert made.returncode == 0, made.stderr
    assert weights_of(here, "prefix") == hash_file(files / "model" / "model.safetensors")[1]
    for location, message in (("models/zoo/none", "nothing at s3://models/zoo/none"), ("none/x", "s3://none/x")):
        refused = here.coord(*arguments(files, "none", f"s3://{location}"), env=env)
        assert refused.returncode == 2
        assert message in refused.stderr.replace("\n", " ")
        assert "Traceback" not in refused.stderr


def load(model: Path, output: Path) -> None:
    base = seed_model.load_pretrained(str(model), output / "base")
    tokens = tokenizer.load_tokenizer(str(model), output / "tokenizer")
    seed_model.check_fit(base, sequence_length=32, tokenizer_size=len(tokens))


def test_a_model_that_the_disk_has_no_room_for_is_refused_before_it_is_written(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (files / "model" / "model.safetensors").stat().st_size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size // 2))
    with pytest.raises(ResourceExhausted, match=r"work-dir: the model takes .* KiB, .*--work-dir"):
        load(files / "model", tmp_path)
    assert list(tmp_path.iterdir()) == []


def _no_folder(model: Path) -> None:
    shutil.rmtree(model)


def _no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def _some_weights(model: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def _damaged_weights(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"nothing" * 100)


def _no_language_model(model: Path) -> None:
    (model / "config.json").write_text('{"model_type": "vit"}')


def _damaged_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"model": {"type": "none"}}')


def _tokenizer_too_large(model: Path) -> None:
    make_tiny_model(model, vocab_size=280)


def _short_context(model: Path) -> None:
    make_tiny_model(model, vocab_size=300, context=16)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_no_folder, "seed-model: there is no folder"),
        (_no_weights, "seed-model: .* no causal language model"),
        (_some_weights, "seed-model: .* lacks 1 of its weights, such as lm_head.weight"),
        (_damaged_weights, "seed-model: .* no causal language model"),
        (_no_language_model, "seed-model: .* no causal language model"),
        (_damaged_tokenizer, "tokenizer: .* cannot be loaded"),
        (_tokenizer_too_large, "tokenizer: it has 300 tokens, the model's vocabulary only 280"),
        (_short_context, "sequence_length 32 is over the model's context of 16"),
    ],
)
def test_a_model_that_cannot_be_the_seed_is_refused(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Path], None], message: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = Path(shutil.copytree(files / "model", tmp_path / "model"))
    harm(model)
    with pytest.raises(InvalidArgument, match=message):
        load(model, tmp_path)
