"""What a token says of its coordinator, when plain text is allowed, and options that every connecting command has."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from cbtm_common import cli_connection
from cbtm_common.cli_connection import add_connection_options, hide_tokens, read_token
from cbtm_common.errors import InvalidArgument
from cbtm_common.security import Security, check_insecure, fingerprint_of, join_token, split_token


def test_a_token_carries_its_coordinator_s_fingerprint() -> None:
    fingerprint = fingerprint_of(b"a certificate")
    assert len(fingerprint) == 43
    assert split_token(join_token("cbtm_worker_x", fingerprint) + "\n") == ("cbtm_worker_x", fingerprint)
    assert split_token(join_token("cbtm_worker_x", "")) == ("cbtm_worker_x", "")


@pytest.mark.parametrize("tail", ["", "abc", "A" * 42, "A" * 44, "!" * 43, "é" * 43])
def test_a_fingerprint_that_is_none_is_refused_without_telling_the_token(tail: str) -> None:
    with pytest.raises(InvalidArgument, match="token") as caught:
        split_token(f"cbtm_worker_secret.{tail}")
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_plain_text_is_allowed_on_loopback(host: str) -> None:
    check_insecure(host, 1)


@pytest.mark.parametrize("host", ["192.0.2.7", "0.0.0.0", "::", "localhost.example.org", "127.0.0.1.example.org", ""])
def test_plain_text_elsewhere_has_to_be_said_twice(host: str) -> None:
    check_insecure(host, 0)
    check_insecure(host, 2)
    with pytest.raises(InvalidArgument, match="twice"):
        check_insecure(host, 1)


def test_the_environment_says_what_to_trust() -> None:
    found = Security.from_environment({"CBTM_CA_FILE": "/ca", "CBTM_CERT_FILE": "", "CBTM_INSECURE": "2"})
    assert found == Security(ca_file=Path("/ca"), insecure=2)
    with pytest.raises(InvalidArgument, match="CBTM_INSECURE"):
        Security.from_environment({"CBTM_INSECURE": "yes"})


def test_files_that_are_not_there_or_go_together_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"ca_file: .*nothing"):
        Security(ca_file=tmp_path / "nothing").trust("host", 1, "")
    with pytest.raises(InvalidArgument, match="key_file"):
        Security(cert_file=tmp_path / "cert").trust("host", 1, "")


def _app() -> typer.Typer:
    app, group = typer.Typer(), typer.Typer()

    @group.command()
    def connecting(coordinator: str = "", token: Annotated[str | None, typer.Option()] = None) -> None:
        typer.echo(f"token {token}, {Security.from_environment()}")

    @app.command()
    def other(name: str = "") -> None:
        typer.echo(name)

    app.add_typer(group, name="group")
    add_connection_options(app)
    return app


def test_commands_that_connect_have_the_options_of_a_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("CBTM_CA_FILE", "CBTM_CERT_FILE", "CBTM_KEY_FILE", "CBTM_INSECURE"):
        # Put back at the end of the test, whatever the command sets.
        monkeypatch.setenv(variable, "")
    (tmp_path / "token").write_text("cbtm_worker_x\n")
    options = ["--token-file", str(tmp_path / "token"), "--ca-file", "/ca", "--insecure", "--insecure"]
    ran = CliRunner().invoke(_app(), ["group", "connecting", *options])
    assert ran.exit_code == 0, ran.output
    assert ran.output.strip() == f"token cbtm_worker_x, {Security(ca_file=Path('/ca'), insecure=2)}"
    assert CliRunner().invoke(_app(), ["other", "--insecure"]).exit_code == 2


def test_a_token_comes_from_a_file_or_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("cbtm_worker_x\nmore\n"))
    assert read_token("-") == "cbtm_worker_x"
    for text in ("", "\n", "secret words"):
        (tmp_path / "token").write_text(text)
        with pytest.raises(InvalidArgument, match="token_file") as caught:
            read_token(str(tmp_path / "token"))
        assert "secret" not in caught.value.message
    with pytest.raises(InvalidArgument, match="cannot be read"):
        read_token(str(tmp_path / "nothing"))


def test_what_ps_shows_has_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr("setproctitle.setproctitle", titles.append)
    monkeypatch.setattr(cli_connection.sys, "argv", ["cbtm-worker"])
    hide_tokens(["join", "--token", "secret", "--name", "me"])
    hide_tokens(["join", "--token=secret"])
    hide_tokens(["join", "--name", "me"])
    assert titles == ["cbtm-worker join --token … --name me", "cbtm-worker join --token=…"]
