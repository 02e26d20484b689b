"""Sites for tests of the whole: a coordinator on loopback with a small run of two clusters, and workers that join it.

The run is made once, by the real command line, from a few real documents. Every `Site` starts from a copy of its
coordinator's data folder, so runs, tasks and data keys are the same everywhere, and with them the weights that training
must come to: `undisturbed()` gives those of a site where nothing goes wrong.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gzip
import hashlib
import json
import shutil
import signal
import socket
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import catalog_service_pb2 as cs
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.files import FileSpec
from cbtm_common.recipe import Recipe
from cbtm_common.rpc import Connection, connect
from tests.support.zygote import LINK_VARIABLE, SKEW_VARIABLE, THROTTLE_VARIABLE, Child, Zygote

RUN = "small"
CLUSTERS = 2
STEPS = 40
# Slow enough that a task takes 1.6 s and so writes one checkpoint (after a second) before its last.
STEP_SECONDS = 0.04
CORPUS = Path(__file__).parents[2] / "examples" / "corpus"
# A run from scratch whose base model is made at once, without a seed task.
RECIPE = f"""
sequence_length = 32
global_batch = 2
steps = {STEPS}
seed = 3
precision = "fp32"
dropout = 0.1
held_out_fraction = 0.1

[optimizer]
learning_rate = 3e-3

[schedule]
warmup_steps = 4

[seed_phase]
fraction = 0.0

[lease]
lease_seconds = 4
renew_seconds = 0.5
checkpoint_seconds = 1
"""
MODEL = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}

# Of each cluster by index: the files of its expert by path, with their SHA-256.
Experts = dict[int, dict[str, str]]


@functools.cache
def zygote() -> Zygote:
    """One for the whole test process."""
    made = Zygote()
    atexit.register(made.close)
    return made


@functools.cache
def _scratch() -> Path:
    path = Path(tempfile.mkdtemp(prefix="cbtm-sites-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


_made = threading.Lock()


@functools.cache
def template() -> Path:
    """The data folder of a coordinator that has the run and nobody working on it. Not to be written to."""
    folder = _scratch() / "template"
    corpus = write_corpus(folder / "corpus.jsonl")
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "model.json").write_text(json.dumps(MODEL))
    with Site(folder, empty=True) as site:
        site.start_coordinator()
        create = ["run", "create", "--data-dir", str(site.data), "--name", RUN, "--corpus", str(corpus)]
        create += ["--clusters", str(CLUSTERS), "--from-scratch", str(folder / "model.json"), "--id-field", "id"]
        made = site.coord(*create, "--recipe", str(folder / "recipe.toml"))
        assert made.wait(120) == 0, made.output
        site.stop_coordinator()
    return site.data


@functools.cache
def undisturbed() -> Experts:
    """The experts that one worker makes when nothing goes wrong."""
    with site("undisturbed") as calm:
        calm.start_coordinator()
        worker = calm.start_worker("calm")
        assert worker.wait(120) == 0, worker.output
        calm.check_registry()
        return calm.experts()


def prepare() -> None:
    """Makes what all sites share; call it before threads do."""
    with _made:
        template()
        undisturbed()


def write_corpus(path: Path, *, each: int = 60, characters: int = 500) -> Path:
    """Documents of two kinds, novels and program text, that fall into two clusters."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for name in ("literature", "code_rust"):
            with gzip.open(CORPUS / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
                for _, line in zip(range(each), lines, strict=False):
                    document = json.loads(line)
                    text = document["text"][200 : 200 + characters]
                    file.write(json.dumps({"id": document["id"], "text": text}) + "\n")
    return path


@contextlib.contextmanager
def site(name: str) -> Iterator[Site]:
    """A site of its own, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_scratch()))
    shutil.copytree(template(), folder / "coordinator")
    with Site(folder) as made:
        yield made
    shutil.rmtree(folder, ignore_errors=True)


class Site:
    """A coordinator's data folder, its process, and the workers started here. Ends them all on leaving."""

    def __init__(self, folder: Path, *, empty: bool = False) -> None:
        self.folder = folder
        # Of every process started here.
        self.environment: dict[str, str] = {}
        self.data = folder / "coordinator"
        self.port, self.http_port = _free_port(), _free_port()
        self.target = f"127.0.0.1:{self.port}"
        self.children: list[Child] = []
        self._coordinator: Child | None = None
        self._connection: Connection | None = None
        if empty:
            made = self.coord("init", "--data-dir", str(self.data))
            assert made.wait(60) == 0, made.output

    # Processes

    @property
    def coordinator(self) -> Child:
        assert self._coordinator is not None, "the coordinator was not started"
        return self._coordinator

    def start_coordinator(self, *, faults: str = "", wait: bool = True) -> Child:
        """Starts it, again on the same ports if it ran before, and waits until it answers, unless told not to."""
        serve = ["serve", "--data-dir", str(self.data), "--host", "127.0.0.1"]
        serve += ["--port", str(self.port), "--http-port", str(self.http_port), "--log-level", "info"]
        environment = {"CBTM_REAPER_SECONDS": "0.2", "CBTM_FAULTS": faults, "CBTM_THREADS": "8"}
        self._coordinator = self._spawn("cbtm-coord", serve, "coordinator", environment)
        if not wait:
            return self._coordinator
        address = self.target
        with connect(address, token=self.join_token, attempts=1) as probe:
            if not probe.wait_until_ready(30):
                raise AssertionError(f"the coordinator does not answer:\n{self.coordinator.output}")
        return self._coordinator

    def stop_coordinator(self) -> None:
        """SIGTERM; it must leave with exit code 0."""
        self.coordinator.send(signal.SIGTERM)
        assert self.coordinator.wait(40) == 0, self.coordinator.output

    def coord(self, *arguments: str) -> Child:
        return self._spawn("cbtm-coord", list(arguments), arguments[0], {})

    def start_worker(
        self,
        name: str,
        *arguments: str,
        slot: str | None = None,
        faults: str = "",
        token: str | None = None,
        step_seconds: float = STEP_SECONDS,
        until_idle: bool = True,
        clock_skew: float = 0.0,
        link_speed: float | None = None,
    ) -> Child:
        """A worker with a cache folder of its own, or that of `slot`: then it is the same machine coming back."""
        join = ["join", "--coordinator", self.target, "--cache-dir", str(self.cache(slot or name)), "--name", name]
        join += ["--device", "cpu", "--threads", "1", "--log-level", "info", *arguments]
        join += ["--token", self.join_token if token is None else token] if token != "" else []
        join += ["--until-idle"] if until_idle else []
        environment = {"CBTM_FAULTS": faults, THROTTLE_VARIABLE: str(step_seconds)}
        environment |= {SKEW_VARIABLE: str(clock_skew)} if clock_skew else {}
        environment |= {LINK_VARIABLE: str(link_speed)} if link_speed else {}
        return self._spawn("cbtm-worker", join, name, environment)

    def check_worker(self, *arguments: str, token: str | None = None) -> Child:
        """`cbtm-worker check`."""
        check = ["check", "--coordinator", self.target, "--cache-dir", str(self.cache("check")), "--device", "cpu"]
        check += ["--token", self.join_token if token is None else token]
        return self._spawn("cbtm-worker", [*check, *arguments], "check", {})

    def _spawn(self, program: str, arguments: list[str], name: str, environment: dict[str, str]) -> Child:
        log = self.folder / "logs" / f"{len(self.children):02d}-{name}.log"
        child = zygote().spawn(program, arguments, log, {**self.environment, **environment})
        self.children.append(child)
        return child

    def cache(self, slot: str) -> Path:
        return self.folder / f"cache-{slot}"

    @property
    def join_token(self) -> str:
        return (self.data / "join.token").read_text().strip()

    @property
    def admin_token(self) -> str:
        return (self.data / "admin.token").read_text().strip()

    @property
    def connection(self) -> Connection:
        """To the coordinator, as its owner; it outlives the coordinator's restarts."""
        if self._connection is None:
            self._connection = connect(self.target, token=self.admin_token)
        return self._connection

    # What is seen from outside

    def status(self) -> ad.GetRunStatusResponse:
        return self.connection.admin.GetRunStatus(ad.GetRunStatusRequest(run=RUN))

    def tasks(self) -> list[ad.TaskStatus]:
        """By cluster index."""
        return sorted(self.status().tasks, key=lambda status: status.task.cluster_index)

    def leased(self) -> ad.TaskStatus | None:
        """The task that is being worked on, if there is one."""
        return next((status for status in self.tasks() if status.HasField("lease")), None)

    def leased_at_step(self, step: int, *, committed: int = 0) -> ad.TaskStatus | None:
        """The task in work, once it has come to `step` and a checkpoint of `committed` or later is visible."""
        status = self.leased()
        if status is None or status.lease.progress.step < step or status.task.committed_step < committed:
            return None
        return status

    def events(self, kind: str = "") -> list[pb.Event]:
        answer = self.connection.admin.ListEvents(ad.ListEventsRequest(run=RUN, page_size=1000))
        return [event for event in answer.events if event.kind == kind or not kind]

    def is_complete(self) -> bool:
        return self.status().run.state == pb.RUN_STATE_COMPLETE

    def experts(self) -> Experts:
        answer = self.connection.catalog.ListExperts(cs.ListExpertsRequest(run=RUN))
        return {expert.cluster_index: {f.path: f.sha256 for f in expert.files} for expert in answer.experts}

    def until(self, condition: Callable[[], Any], what: str, seconds: float = 40.0) -> Any:
        """The first truthy value of `condition`. Raises AssertionError with all logs after `seconds`."""
        deadline = time.monotonic() + seconds
        pause = threading.Event()
        while not (value := condition()):
            if time.monotonic() > deadline:
                raise AssertionError(f"{what} did not happen within {seconds} s\n{self.logs()}")
            pause.wait(0.05)
        return value

    def logs(self) -> str:
        return "\n".join(f"--- {child.log.name}\n{child.output[-3000:]}" for child in self.children)

    def set_lease(self, **fields: float) -> None:
        """Changes the run's bounds on leases, which touch no weight. Before the coordinator starts."""
        with contextlib.closing(sqlite3.connect(self.data / "registry.db")) as database, database:
            (text,) = database.execute("SELECT recipe_json FROM runs WHERE name = ?", (RUN,)).fetchone()
            recipe = Recipe.from_json(text)
            changed = recipe.model_copy(update={"lease": recipe.lease.model_copy(update=fields)})
            database.execute("UPDATE runs SET recipe_json = ? WHERE name = ?", (changed.to_json(), RUN))

    # What is on the coordinator's disk, also while it is dead

    def rows(self, query: str) -> list[sqlite3.Row]:
        with contextlib.closing(sqlite3.connect(self.data / "registry.db", timeout=10)) as database:
            database.row_factory = sqlite3.Row
            return database.execute(query).fetchall()

    def check_registry(self) -> None:
        """Raises AssertionError where an invariant does not hold.

        No two leases of a task at one time; no checkpoint that is visible with an object missing or wrong; nothing
        taken away, refused or failed without a reason to read.
        """
        last: dict[str, sqlite3.Row] = {}
        for lease in self.rows("SELECT * FROM leases ORDER BY task_id, epoch"):
            before = last.get(lease["task_id"])
            if before is not None:
                assert before["end_time"] is not None, f"lease {before['id']} is live beside {lease['id']}"
                assert before["end_time"] <= lease["acquire_time"], f"{before['id']} and {lease['id']} overlap"
            last[lease["task_id"]] = lease
        for what in (
            "leases WHERE state IN ('EXPIRED', 'REVOKED')",
            "checkpoints WHERE state IN ('PRUNED', 'REJECTED')",
            "tasks WHERE state = 'FAILED'",
            "events WHERE kind IN ('lease.expired', 'lease.revoked', 'checkpoint.refused', 'task.failed')",
        ):
            assert not self.rows(f"SELECT id FROM {what} AND reason = ''"), f"no reason is given: {what}"
        visible = "SELECT * FROM checkpoints WHERE state IN ('COMMITTED', 'ACCEPTED')"
        for row in self.rows(visible):
            wrong = [why for file in files_from_json(row["files_json"]) if (why := self._wrong_object(file))]
            # One that was pruned since the row was read may have lost its objects.
            still = self.rows(f"{visible} AND id = '{row['id']}'")
            assert not (wrong and still), f"checkpoint {row['id']} of step {row['step']} is {row['state']}: {wrong}"

    def _wrong_object(self, file: FileSpec) -> str:
        path = self.data / "objects" / "objects" / file.key
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return f"{file.key} is missing"
        good = len(data) == file.size and hashlib.sha256(data).hexdigest() == file.sha256
        return "" if good else f"{file.key} holds other bytes"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._connection is not None:
            self._connection.close()
        for child in self.children:
            child.kill()


def files_from_json(text: str) -> list[FileSpec]:
    """As the registry keeps them; read here by hand, so that the database is all that this trusts."""
    return [FileSpec(path=p, key=k, size=s, sha256=h) for p, k, s, h in json.loads(text)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
