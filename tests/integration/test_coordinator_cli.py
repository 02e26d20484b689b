"""`cbtm-coord` as a run owner types it: what goes wrong is one clear line, an exit code, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cbtm_api.v1 import catalog_service_pb2 as cs
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.recipe import LeaseRecipe
from cbtm_common.rpc import Connection
from tests.support.coordinator import RunningCoordinator
from tests.support.raw_run import RECIPE, RawWorker, make_run
from tests.support.run_fixture import zygote

pytestmark = pytest.mark.integration

_MODEL = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
USAGE, ERROR = 2, 1
_LASTING = RECIPE.model_copy(update={"lease": LeaseRecipe(lease_seconds=3600)})


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A command that came to its end. `output` is both of its streams."""

    returncode: int
    output: str


def coord(*arguments: str, data_dir: Path, env: dict[str, str] | None = None) -> Ended:
    log = data_dir.with_name("commands.log")
    log.unlink(missing_ok=True)
    child = zygote().spawn("cbtm-coord", arguments, log, {"CBTM_DATA_DIR": str(data_dir), **(env or {})})
    return Ended(returncode=child.wait(), output=child.output)


@pytest.fixture(scope="module")
def admin(coordinator: RunningCoordinator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    """With the run `web`, on which the worker `gpu` works."""
    with coordinator.connect(coordinator.token("admin")) as connection:
        make_run(connection, tmp_path_factory.mktemp("run"), recipe=_LASTING)
        with contextlib.closing(RawWorker(coordinator)) as worker:
            worker.renew(worker.lease(), step=3)
            yield connection


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files for `run create`: good ones and bad ones."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "recipe.toml").write_text("sequence_length = 8\nglobal_batch = 1\nsteps = 2\n")
    (folder / "bad-recipe.toml").write_text("[optimizer]\nlearning_rat = 1\n")
    (folder / "model.json").write_text(json.dumps(_MODEL))
    texts = [f"The {word} jumps over the lazy dog, again and again, until night falls." for word in ("fox", "cat")]
    (folder / "two.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "empty.jsonl").write_text("")
    (folder / "no-json.jsonl").write_text("this is\nno JSON\n")
    return folder


def _create(inputs: Path, **changes: str) -> list[str]:
    options = {
        "name": "new",
        "corpus": str(inputs / "two.jsonl"),
        "clusters": "1",
        "recipe": str(inputs / "recipe.toml"),
        "from-scratch": str(inputs / "model.json"),
        **{name.replace("_", "-"): value for name, value in changes.items()},
    }
    return ["run", "create", *(part for name, value in options.items() for part in (f"--{name}", value))]


def _check_refusal(failed: Ended, code: int, *named: str) -> None:
    assert failed.returncode == code, failed.output
    last = failed.output.splitlines()[-1]
    assert last.startswith("cbtm-coord: error: "), failed.output
    assert all(name in last for name in named), last
    assert "Traceback" not in failed.output
    assert "defect" not in last


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"recipe": "bad-recipe.toml"}, USAGE, ["bad-recipe.toml", "optimizer.learning_rat"]),
        ({"recipe": "none.toml"}, USAGE, ["recipe", "none.toml"]),
        ({"corpus": "empty.jsonl"}, USAGE, ["corpus", "no document"]),
        ({"corpus": "none.jsonl"}, USAGE, ["corpus", "none.jsonl"]),
        ({"corpus": "no-json.jsonl"}, USAGE, ["no-json.jsonl"]),
        ({"text_field": "body"}, USAGE, ["body"]),
        ({"clusters": "3"}, USAGE, ["clusters", "3", "2"]),
        ({"clusters": "0"}, USAGE, ["clusters"]),
        ({"name": "web"}, ERROR, ["web"]),
        ({"name": "two words"}, USAGE, ["name", "two words"]),
        ({"from_scratch": "none.json"}, USAGE, ["none.json"]),
        ({"from_scratch": "two.jsonl"}, USAGE, ["two.jsonl"]),
        ({"seed_model": "anything"}, USAGE, ["--seed-model", "--from-scratch"]),
    ],
)
def test_a_run_that_cannot_be_made_says_why_and_leaves_no_run(
    coordinator: RunningCoordinator,
    admin: Connection,
    inputs: Path,
    changes: dict[str, str],
    code: int,
    named: list[str],
) -> None:
    files = {n: str(inputs / v) if "." in v else v for n, v in changes.items()}
    _check_refusal(coord(*_create(inputs, **files), data_dir=coordinator.data_dir), code, *named)
    assert [run.name for run in admin.catalog.ListRuns(cs.ListRunsRequest()).runs] == ["web"]


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (["status", "nope"], ERROR, ["nope"]),
        (["run", "pause", "nope"], ERROR, ["nope"]),
        (["run", "delete", "nope", "--yes"], ERROR, ["nope"]),
        (["run", "baseline", "nope"], ERROR, ["nope"]),
        (["cluster", "list", "--run", "nope"], ERROR, ["nope"]),
        (["cluster", "show", "7", "--run", "web"], ERROR, ["7"]),
        (["cluster", "requeue", "7", "--run", "web"], ERROR, ["7"]),
        (["worker", "revoke", "nobody"], ERROR, ["nobody"]),
        (["token", "revoke", "nothing"], ERROR, ["nothing"]),
        (["token", "create", "--role", "emperor"], USAGE, ["emperor", "worker"]),
        (["token", "create", "--expires", "soon"], USAGE, ["soon"]),
        (["token", "create", "--uses", "-1"], USAGE, ["max_uses"]),
        (["events", "--run", "nope"], ERROR, ["nope"]),
        (["status", "--coordinator", "http://127.0.0.1:1"], USAGE, ["HOST:PORT"]),
        (["status", "--token", "wrong"], ERROR, ["token"]),
    ],
)
def test_a_command_that_cannot_be_done_says_why(
    coordinator: RunningCoordinator, admin: Connection, arguments: list[str], code: int, named: list[str]
) -> None:
    _check_refusal(coord(*arguments, data_dir=coordinator.data_dir), code, *named)


def test_without_a_coordinator_a_command_says_how_to_name_or_start_one(tmp_path: Path) -> None:
    _check_refusal(coord("status", data_dir=tmp_path / "none"), USAGE, "cbtm-coord serve", "--coordinator")


def test_a_coordinator_that_does_not_answer_is_named(coordinator: RunningCoordinator) -> None:
    failed = coord("status", "--coordinator", "127.0.0.1:9", data_dir=coordinator.data_dir)
    _check_refusal(failed, ERROR, "127.0.0.1:9", "does not answer")


def test_configuration_that_is_wrong_names_field_and_source(coordinator: RunningCoordinator, tmp_path: Path) -> None:
    _check_refusal(
        coord("serve", env={"CBTM_THREADS": "one"}, data_dir=coordinator.data_dir), USAGE, "threads", "CBTM_THREADS"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "coordinator.toml").write_text("prot = 1\n")
    _check_refusal(coord("serve", data_dir=tmp_path / "data"), USAGE, "prot", "coordinator.toml")


def test_an_error_with_debug_shows_its_traceback(coordinator: RunningCoordinator) -> None:
    failed = coord("status", "nope", "--debug", data_dir=coordinator.data_dir)
    assert failed.returncode == ERROR
    assert "Traceback" in failed.output
    assert failed.output.splitlines()[-1].startswith("cbtm-coord: error: ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["status", "web"],
        ["run", "list"],
        ["cluster", "list", "--run", "web"],
        ["cluster", "show", "0", "--run", "web"],
        ["worker", "list"],
        ["token", "list"],
        ["events"],
    ],
)
def test_what_is_shown_to_people_is_also_there_as_json(
    coordinator: RunningCoordinator, admin: Connection, arguments: list[str]
) -> None:
    shown = coord(*arguments, data_dir=coordinator.data_dir)
    assert shown.returncode == 0, shown.output
    assert shown.output.strip()
    machine = coord(*arguments, "--json", data_dir=coordinator.data_dir)
    assert machine.returncode == 0, machine.output
    assert json.loads(machine.output)


def test_the_status_names_state_worker_and_step(coordinator: RunningCoordinator, admin: Connection) -> None:
    facts = json.loads(coord("status", "web", "--json", data_dir=coordinator.data_dir).output)
    assert facts["state"] == "TRAINING"
    (working,) = [task for task in facts["tasks"] if task["worker"]]
    assert (working["worker"], working["step"], working["state"]) == ("gpu", 3, "LEASED")
    shown = coord("status", "web", data_dir=coordinator.data_dir).output
    assert "gpu" in shown
    assert "3/10" in shown


def test_a_name_full_of_markup_breaks_no_table(coordinator: RunningCoordinator, admin: Connection) -> None:
    with contextlib.closing(RawWorker(coordinator, name="[/red] [bold]x[/]")) as worker:
        lease = worker.acquire().lease
        shown = [
            coord("worker", "list", data_dir=coordinator.data_dir),
            coord("status", "web", data_dir=coordinator.data_dir),
        ]
        assert all(one.returncode == 0 for one in shown), [one.output for one in shown]
        assert all("[/red] [bold]x[/]" in one.output for one in shown)
        worker.release(lease, ws.RELEASE_REASON_PREEMPTED)


def test_a_token_is_made_listed_and_revoked(coordinator: RunningCoordinator, admin: Connection) -> None:
    create = ["token", "create", "--role", "worker", "--uses", "1", "--expires", "1h", "--label", "lab", "--json"]
    made = json.loads(coord(*create, data_dir=coordinator.data_dir).output)
    assert made["secret"].startswith("cbtm_worker_")
    RawWorker(coordinator, name="lab", token=made["secret"]).close()
    rows = json.loads(coord("token", "list", "--json", data_dir=coordinator.data_dir).output)
    (row,) = [row for row in rows if row["id"] == made["id"]]
    assert (row["uses"], row["of"], row["label"], row["revoked"]) == (1, 1, "lab", False)
    assert coord("token", "revoke", made["id"], data_dir=coordinator.data_dir).returncode == 0


def test_deleting_asks_first(coordinator: RunningCoordinator, admin: Connection) -> None:
    refused = coord("run", "delete", "web", data_dir=coordinator.data_dir)
    assert refused.returncode != 0
    assert "Traceback" not in refused.output
    assert [run.name for run in admin.catalog.ListRuns(cs.ListRunsRequest()).runs] == ["web"]


def test_the_schema_is_in_step(coordinator: RunningCoordinator) -> None:
    checked = coord("db", "check", data_dir=coordinator.data_dir)
    assert checked.returncode == 0, checked.output
    assert "in step" in checked.output


def test_an_empty_registry_is_not_in_step_until_it_is_upgraded(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert coord("db", "check", data_dir=tmp_path / "data").returncode == ERROR
    assert coord("db", "upgrade", data_dir=tmp_path / "data").returncode == 0
    assert coord("db", "check", data_dir=tmp_path / "data").returncode == 0
