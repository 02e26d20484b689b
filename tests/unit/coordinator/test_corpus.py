"""Which files are a corpus, and what is said when there is nothing to read."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import pytest

from cbtm_common.errors import InvalidArgument
from cbtm_coordinator.clustering.corpus import ReadReport, open_corpus
from tests.support.corpora import LINES, ROWS, parquet, read, texts, zst


def test_a_folder_is_searched_through_in_order_and_other_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "c" / "two.md").write_text("second")
    (tmp_path / "b" / "one.txt").write_text("first")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"zeroth"))
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    assert texts(read(tmp_path)[0]) == ["zeroth", "second", "first"]


def test_globs_go_into_folders_and_a_file_found_twice_is_read_once(tmp_path: Path) -> None:
    for name in ("x/1.txt", "x/y/2.txt", "3.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = read(tmp_path / "**" / "*.txt", tmp_path / "3.txt", tmp_path)[0]
    assert sorted(texts(found)) == ["3.txt", "x/1.txt", "x/y/2.txt"]


def test_a_file_found_through_a_link_too_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    assert len(read(tmp_path)[0]) == 3


def test_a_folder_that_may_not_be_looked_into_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def guarded(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(InvalidArgument, match=r"corpus: .*closed cannot be read: Permission denied"):
        open_corpus([str(tmp_path)])


def test_a_name_that_is_no_utf8_is_told_in_characters_that_can_be_written(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")
    Path(path).write_bytes(LINES + b"nonsense\n")
    _, report = read(tmp_path)
    assert report.samples[0].where.encode() == os.fsencode(tmp_path) + rb"/caf\udce9.jsonl:4"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_the_bytes_told_for_progress_add_up_to_the_corpus(tmp_path: Path, name: str) -> None:
    if name.endswith("parquet"):
        parquet(tmp_path / name, ROWS)
    else:
        (tmp_path / name).write_bytes({".gz": gzip.compress, ".zst": zst}.get(name[7:], bytes)(LINES))
    corpus = open_corpus([str(tmp_path)])
    told: list[int] = []
    list(corpus.documents(ReadReport(), on_bytes=told.append))
    assert sum(told) == corpus.total_bytes


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({}, {}, r"corpus: nothing readable at"),
        ({"a.png": b"x"}, {}, r"corpus: nothing readable at .* expected \.jsonl"),
        ({"a.jsonl": b""}, {}, "hold no document"),
        ({"a.jsonl": b"\n \r\n\n"}, {}, "hold no document"),
        ({"a.jsonl.gz": gzip.compress(b"")}, {}, "hold no document"),
        ({"a.jsonl.zst": b""}, {}, "hold no document"),
        ({"a.jsonl": b"nonsense\n"}, {}, "hold no document: .*a.jsonl:1 is not JSON"),
        ({"a.jsonl": b"[1]\n"}, {}, "hold no document"),
        ({"a.txt": b""}, {}, "hold no document"),
        ({"a.jsonl": b'{"body": "x"}\n'}, {}, r"text-field: no document has a field 'text'; there are \['body'\]"),
        ({"a.jsonl": LINES}, {"text_field": "body"}, r"text-field: .* 'body'; there are \['id', 'text'\]"),
        ({"a.jsonl": LINES}, {"id_field": "key"}, r"id-field: .* 'key'; there are \['id', 'text'\]"),
        ({"a.parquet": b"no"}, {}, "corpus: .*a.parquet cannot be read"),
    ],
)
def test_a_corpus_that_cannot_be_used_is_refused_before_any_work(
    tmp_path: Path, content: dict[str, bytes], options: dict[str, str], message: str
) -> None:
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(InvalidArgument, match=message) as caught:
        open_corpus([str(tmp_path)], **options)
    assert caught.value.metadata["field"] in ("corpus", "text-field", "id-field")


def test_an_empty_name_is_not_taken_for_this_folder() -> None:
    with pytest.raises(InvalidArgument, match="corpus: is empty"):
        open_corpus([""])


def test_a_field_that_the_first_documents_lack_is_looked_for_in_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"other": 1}\n' * 5000)
    (tmp_path / "b.jsonl").write_bytes(LINES)
    documents, report = read(tmp_path)
    assert len(documents) == 3
    assert report.bad_lines == 5000
