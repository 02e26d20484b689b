"""The volunteer's command line: what it passes on, and what it refuses."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cbtm_common.errors import InvalidArgument
from cbtm_worker import check, loop, signals
from cbtm_worker.check import Finding
from cbtm_worker.cli import app
from cbtm_worker.config import WorkerConfig
from cbtm_worker.train.job import Shard

JOIN = ["join", "--coordinator", "192.0.2.7:50051"]


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[WorkerConfig]]:
    """The configurations that `join` works with, instead of working. Logging is left as it was."""
    configs: list[WorkerConfig] = []
    monkeypatch.setattr(loop, "join", lambda config, stop, display: configs.append(config))
    monkeypatch.setattr(signals.StopSignal, "install", lambda self: None)
    names = (None, "httpx", "httpcore")
    levels = [logging.getLogger(name).level for name in names]
    yield configs
    for name, level in zip(names, levels, strict=True):
        logging.getLogger(name).setLevel(level)


def run(*arguments: str, env: dict[str, str] | None = None) -> Any:
    return CliRunner().invoke(app, arguments, env={"CBTM_TOKEN": "", "CBTM_COORDINATOR": "", **(env or {})})


def test_every_flag_reaches_the_configuration(joined: list[WorkerConfig], tmp_path: Path) -> None:
    flags = "--token T --device cuda:1 --name box --run web --max-tasks 3 --until-idle --micro-batch 4 --threads 2"
    answer = run(
        *JOIN, *flags.split(), "--compile", "--shard", "always", "--max-cache-gib", "1.5", "--cache-dir", str(tmp_path)
    )
    assert answer.exit_code == 0, answer.output
    assert joined == [
        WorkerConfig(
            coordinator="192.0.2.7:50051",
            token="T",
            cache_dir=tmp_path,
            device="cuda:1",
            name="box",
            run="web",
            max_tasks=3,
            until_idle=True,
            micro_batch=4,
            compile=True,
            shard=Shard.ALWAYS,
            threads=2,
            max_cache_bytes=3 << 29,
        )
    ]


def test_coordinator_and_token_come_from_the_environment_too(joined: list[WorkerConfig]) -> None:
    answer = run("join", env={"CBTM_COORDINATOR": "host:1", "CBTM_TOKEN": "secret", "CBTM_CACHE_DIR": "/tmp/x"})
    assert answer.exit_code == 0, answer.output
    (config,) = joined
    assert (config.coordinator, config.token, config.cache_dir) == ("host:1", "secret", Path("/tmp/x"))
    assert config.name


def test_an_address_without_a_port_is_refused_naming_the_field(joined: list[WorkerConfig]) -> None:
    answer = run("join", "--coordinator", "http://host")
    assert isinstance(answer.exception, InvalidArgument)
    assert answer.exception.field == "coordinator"
    assert joined == []


@pytest.mark.parametrize(
    "flags", [["--log-level", "loud"], ["--max-tasks", "0"], ["--micro-batch", "0"], ["--threads", "x"], ["--what"]]
)
def test_wrong_flags_are_usage_errors(joined: list[WorkerConfig], flags: list[str]) -> None:
    assert run(*JOIN, *flags).exit_code == 2
    assert joined == []


def test_signed_urls_are_not_logged(joined: list[WorkerConfig]) -> None:
    assert run(*JOIN, "--log-level", "debug").exit_code == 0
    for name in ("httpx", "httpcore"):
        assert not logging.getLogger(name).isEnabledFor(logging.INFO)


@pytest.mark.parametrize("fit", [True, False])
def test_a_check_ends_with_whether_the_machine_is_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fit: bool
) -> None:
    def examine(config: WorkerConfig, tell: Any) -> bool:
        tell(Finding(name="reachability", ok=True, detail="it answers"))
        tell(Finding(name="disk", ok=fit, detail="10 GiB free", remedy="" if fit else "free some space"))
        tell(Finding(name="upload", ok=None, detail="slow", remedy="it works"))
        return fit

    monkeypatch.setattr(check, "check", examine)
    asked = ["check", "--coordinator", "host:1", "--cache-dir", str(tmp_path / "new")]
    plain, as_json = run(*asked), run(*asked, "--json")
    assert plain.exit_code == as_json.exit_code == (0 if fit else 1)
    assert "✓ reachability: it answers" in plain.output
    assert "· upload: slow" in plain.output
    assert ("✗ disk: 10 GiB free\n    free some space" in plain.output) is (not fit)
    assert f'"fit": {str(fit).lower()}' in as_json.output
