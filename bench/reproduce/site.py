"""A coordinator and its workers in a folder that outlives them: what was trained stays, what was not goes on."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.reproduce.grid import Size, toml
from cbtm_common.errors import NotFound
from cbtm_common.recipe import Recipe
from cbtm_common.rpc import connect
from examples.demo.processes import Processes, ProcessFailed

_POLL_SECONDS = 5.0
Facts = Mapping[str, Any]


class Site:
    """A context manager. `create` and `baseline` make what is not there yet; `wait` trains."""

    def __init__(self, folder: Path, size: Size, *, total_tokens: float, console: Console) -> None:
        self._folder = folder
        self._data = folder / "coordinator"
        self._size = size
        self._console = console
        self._processes = Processes(folder / "logs")
        self._runs: dict[str, float] = {}
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.1f} of {task.total:.1f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
        )
        self._bar = self._bars.add_task("training, million tokens", total=round(total_tokens / 1e6, 1))

    def __enter__(self) -> Self:
        self._processes.__enter__()
        try:
            self._start()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._processes.__exit__(kind, error, tb)

    def _start(self) -> None:
        data = self._data
        if not data.exists():
            self._processes.run("init", ["cbtm-coord", "init", "--data-dir", str(data)])
        serve = ["cbtm-coord", "serve", "--data-dir", str(data), "--host", "127.0.0.1", "--port", "0"]
        self._processes.start("coordinator", [*serve, "--http-port", "0"])
        join = shlex.split(self._processes.wait_for_line("coordinator", "cbtm-worker join"))
        self.target = (data / "coordinator.address").read_text("utf-8").strip()
        self.token = (data / "admin.token").read_text("utf-8").strip()
        for number in range(self._size.workers):
            name = f"worker-{number}"
            options = ["--cache-dir", str(self._folder / name), "--name", name, "--device", self._size.device]
            self._processes.start(name, [*join, *options, "--threads", str(self._size.threads)])

    @property
    def cache(self) -> Path:
        """Of what is read from the coordinator."""
        return self._folder / "client"

    def facts(self, name: str) -> Facts | None:
        """Of a run; None when there is none of this name."""
        from cbtm_coordinator.cli.status import run_facts

        with connect(self.target, token=self.token) as connection:
            try:
                return run_facts(connection, name)
            except NotFound:
                return None

    def create(
        self,
        name: str,
        corpus: Path,
        recipe: Recipe,
        *,
        clusters: int,
        base: Path,
        tokenizer: Path | None = None,
    ) -> str:
        """`name`. `base` is a folder with a model to branch from, or a config to train a seed from scratch by."""
        found = self.facts(name)
        if found is not None and found["state"] == "DRAFT":
            self._coord("delete", name, "--yes")
            found = None
        if found is None:
            path = self._folder / "recipes" / f"{name}.toml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(toml(recipe), "utf-8")
            options = ["--name", name, "--corpus", str(corpus), "--clusters", str(clusters), "--recipe", str(path)]
            options += ["--seed-model" if base.is_dir() else "--from-scratch", str(base), "--id-field", "id"]
            if tokenizer is not None:
                options += ["--tokenizer", str(tokenizer)]
            self._coord("create", *options)
        return self._known(name)

    def baseline(self, name: str, beside: str, *, batch: int, learning_rate: float) -> str:
        """`name`, a dense run that trains on as many tokens as `beside`."""
        if self.facts(name) is None:
            options = ["--global-batch", str(batch), "--learning-rate", repr(learning_rate)]
            self._coord("baseline", beside, "--name", name, *options)
        return self._known(name)

    def _known(self, name: str) -> str:
        self._runs.setdefault(name, 0.0)
        return name

    def _coord(self, command: str, *arguments: str) -> None:
        # Every --data-dir names its own coordinator, which serves while this one asks it.
        self._processes.run(f"run {command}", ["cbtm-coord", "run", command, *arguments, "--data-dir", str(self._data)])

    def wait(self, names: Sequence[str]) -> None:
        """Trains until these runs are complete. Raises ProcessFailed."""
        pause = threading.Event()
        with self._bars:
            while True:
                self._processes.check()
                facts = {name: self._fresh(name) for name in self._runs}
                trained = sum(f["trained_share"] * f["budget_tokens"] for f in facts.values())
                self._bars.update(self._bar, completed=round(trained / 1e6, 1))
                failed = [f for f in facts.values() if f["state"] == "FAILED"]
                if failed:
                    raise ProcessFailed("; ".join(f"{f['run']}: {f['reason']}" for f in failed))
                if all(facts[name]["state"] == "COMPLETE" for name in names):
                    return
                pause.wait(_POLL_SECONDS)

    def _fresh(self, name: str) -> Facts:
        found = self.facts(name)
        if found is None:
            raise ProcessFailed(f"run {name} has been deleted")
        return found
