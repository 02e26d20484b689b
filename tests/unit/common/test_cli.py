"""What the command lines share: one clear line for an error, exit codes, tables and JSON."""

from __future__ import annotations

import json
import sys

import pytest
import typer

from cbtm_common import cli
from cbtm_common.errors import CbtmError, InvalidArgument, Unavailable


def _run(monkeypatch: pytest.MonkeyPatch, error: BaseException | None, *arguments: str) -> int:
    """Exit code of a program whose only command raises `error`."""
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)

    @app.command()
    def command() -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(sys, "argv", ["prog", *arguments])
    monkeypatch.delenv("CBTM_DEBUG", raising=False)
    with pytest.raises(SystemExit) as caught:
        cli.run_app(app, name="prog")
    return int(caught.value.code or 0)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (InvalidArgument("steps: too few\nby far", field="steps"), cli.USAGE_ERROR),
        (Unavailable("no answer"), cli.ERROR),
        (CbtmError("anything"), cli.ERROR),
        (BrokenPipeError(), 0),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], error: BaseException | None, code: int
) -> None:
    assert _run(monkeypatch, error) == code
    written = capfd.readouterr().err
    assert written.count("\n") == (code != 0)
    assert "Traceback" not in written
    assert written.startswith("prog: error: ") or not code


def test_an_interruption_is_no_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run(monkeypatch, KeyboardInterrupt()) == cli.INTERRUPTED
    assert "error" not in capfd.readouterr().err


def test_a_defect_is_called_one(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run(monkeypatch, ZeroDivisionError("division by zero")) == cli.ERROR
    written = capfd.readouterr().err
    assert "ZeroDivisionError: division by zero" in written
    assert "--debug" in written
    assert written.count("\n") == 1


def test_debug_shows_the_traceback_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _run(monkeypatch, Unavailable("no answer"), "--debug") == cli.ERROR
    assert "Traceback" in capfd.readouterr().err


def test_an_unknown_option_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert _run(monkeypatch, None, "--nonsense") == cli.USAGE_ERROR
    assert "--nonsense" in capfd.readouterr().err


def test_a_table_as_json_is_objects_keyed_by_its_columns(capsys: pytest.CaptureFixture[str]) -> None:
    cli.show_table("Tasks", ["ID", "Last seen", "Tokens/s"], [["a", None, 2.5]], as_json=True)
    assert json.loads(capsys.readouterr().out) == [{"id": "a", "last_seen": None, "tokens_per_s": 2.5}]


def test_a_table_in_a_pipe_never_cuts_an_id(capsys: pytest.CaptureFixture[str]) -> None:
    long = "worker_" + "x" * 26
    cli.show_table("Workers", ["ID", "Why"], [[long, "word " * 60]], as_json=False)
    assert long in capsys.readouterr().out


def test_markup_in_what_others_wrote_is_shown_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    cli.show_table("Workers", ["Name"], [["[red]evil[/red] [/] [link=x]"]], as_json=False)
    assert "[red]evil[/red] [/] [link=x]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "-"), (True, "yes"), (False, "no"), (1234567, "1,234,567"), (0.123456, "0.1235")]
)
def test_values_are_shown_for_people(value: object, shown: str) -> None:
    assert cli.show_value(value) == shown


@pytest.mark.parametrize(
    ("size", "shown"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (1 << 51, "2048.0 TiB")]
)
def test_sizes_are_shown_for_people(size: float, shown: str) -> None:
    assert cli.human_bytes(size) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(59.9, "59 s"), (61, "1 min 01 s"), (5025, "1 h 23 min"), (90_000, "1 d 01 h")]
)
def test_durations_are_shown_for_people(seconds: float, shown: str) -> None:
    assert cli.human_seconds(seconds) == shown
