from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cbtm._cli import app
from cbtm._cli_options import parse_numbers, read_lines, read_texts
from cbtm_common.errors import InvalidArgument


def test_a_command_without_experts_says_where_they_may_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CBTM_COORDINATOR", raising=False)
    result = CliRunner().invoke(app, ["route", "a text"])
    assert isinstance(result.exception, InvalidArgument)
    assert "--coordinator HOST:PORT and --run NAME" in result.exception.message


def test_json_lines_give_their_text_field_and_skip_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two", "id": 2}\n')
    assert list(read_texts(path, "text")) == ["one", "two"]


def test_any_other_file_is_one_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\ntwo\n")
    assert list(read_texts(path, "text")) == ["one\ntwo\n"]


def test_a_file_of_many_texts_has_one_on_each_line_but_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\n\n  \ntwo\n")
    assert list(read_lines(path, "text")) == ["one", "two"]
    lines = tmp_path / "texts.jsonl"
    lines.write_text('{"text": "one\\ntwo"}\n')
    assert list(read_lines(lines, "text")) == ["one\ntwo"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"body": "x"}', r"texts\.jsonl:1: no text in field 'text'; it has body"),
        ("[1]", "it has no object"),
        ("{", "texts.jsonl:1: not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InvalidArgument, match=message):
        list(read_texts(path, "text"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="there is no file"):
        list(read_texts(tmp_path / "no.jsonl", "text"))


def test_numbers_are_read_with_commas() -> None:
    assert parse_numbers("1,2, 8") == [1, 2, 8]
    with pytest.raises(InvalidArgument, match="top_k"):
        parse_numbers("two")
