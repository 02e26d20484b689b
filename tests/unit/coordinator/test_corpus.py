"""Reading a corpus: every format, what is bad in it, and what is said when there is nothing to read."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from cbtm_common.errors import InvalidArgument
from cbtm_coordinator.clustering import formats
from cbtm_coordinator.clustering.corpus import Document, ReadReport, open_corpus

ROWS = [{"id": f"d{i}", "text": f"document number {i} of é"} for i in range(3)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def read(*patterns: Path | str, **options: Any) -> tuple[list[Document], ReadReport]:
    report = ReadReport()
    return list(open_corpus([str(p) for p in patterns], **options).documents(report)), report


def texts(documents: list[Document]) -> list[str]:
    return [document.text for document in documents]


def zst(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor().compress(data)


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.json", LINES),
        ("a.ndjson", LINES),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.jsonl.zst", zst(LINES)),
        ("a.jsonl", LINES.replace(b"\n", b"\r\n\n")),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.jsonl", LINES.rstrip(b"\n")),
    ],
    ids=["jsonl", "json", "ndjson", "gz", "zst", "blank lines", "byte order mark", "no last newline"],
)
def test_json_lines(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    documents, report = read(tmp_path / name)
    assert texts(documents) == [row["text"] for row in ROWS]
    assert (report.documents, report.bad_lines) == (3, 0)
    assert report.characters == sum(len(row["text"]) for row in ROWS)


def test_parquet(tmp_path: Path) -> None:
    documents, report = read(parquet(tmp_path / "a.parquet", ROWS), id_field="id")
    assert texts(documents) == [row["text"] for row in ROWS]
    assert [document.id for document in documents] == ["d0", "d1", "d2"]
    assert report.bad_lines == 0


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


def test_a_long_text_file_is_cut_into_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_CHARACTERS", 4)
    (tmp_path / "a.txt").write_text("abcdéfghi")
    documents, _ = read(tmp_path / "a.txt")
    assert texts(documents) == ["abcd", "éfgh", "i"]
    assert len({document.id for document in documents}) == 3


def test_other_fields_are_read_when_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x", "n": 7}\n{"body": "y", "n": "k"}\n')
    documents, _ = read(tmp_path / "a.jsonl", text_field="body", id_field="n")
    assert documents == [Document(id="7", text="x"), Document(id="k", text="y")]


def test_ids_without_a_field_are_the_same_each_time_and_differ(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    first, second = (read(tmp_path / "a.jsonl")[0] for _ in range(2))
    assert first == second
    assert len({document.id for document in first}) == 3


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "is not JSON"),
        ("[1, 2]", "is not an object"),
        ('"text"', "is not an object"),
        ("{}", "'text' is missing"),
        ('{"text": 3}', "not text"),
        ('{"text": null}', "not text"),
        ('{"text": "  \\n"}', "empty"),
        ('{"text": "half a pair: \\ud83d"}', "half a character"),
        ("[" * 50_000, "nested too deep"),
    ],
)
def test_a_bad_line_is_counted_and_shown_and_the_others_are_read(tmp_path: Path, line: str, why: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + '\n{"text": "also good"}\n')
    documents, report = read(path)
    assert texts(documents) == ["good", "also good"]
    assert report.bad_lines == 1
    assert report.samples[0].where == f"{path}:2"
    assert why in report.samples[0].why


@pytest.mark.parametrize("given", ["null", "1.5", "[1]", '{"a": 1}', '"\\udc00"'])
def test_an_id_that_is_none_makes_a_bad_line(tmp_path: Path, given: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "id": 1}\n{"text": "y", "id": ' + given + "}\n")
    documents, report = read(tmp_path / "a.jsonl", id_field="id")
    assert [document.id for document in documents] == ["1"]
    assert report.bad_lines == 1


def test_text_that_is_not_utf8_makes_a_bad_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xff\xfe\xfa"}\n')
    documents, report = read(tmp_path / "a.jsonl")
    assert texts(documents) == ["good"]
    assert report.bad_lines == 1


def test_only_some_of_many_bad_lines_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + "nonsense\n" * 500)
    _, report = read(tmp_path / "a.jsonl")
    assert report.bad_lines == 500
    assert len(report.samples) == 20


def _damaged(data: bytes) -> bytes:
    place = 3 * len(data) // 4
    return data[:place] + bytes(255 - b for b in data[place : place + 40]) + data[place + 40 :]


# More than the readers take in at once, so that the end is not met with the first line.
_MANY = b"".join(b'{"text": "%s"}\n' % random.Random(i).randbytes(1000).hex().encode() for i in range(600))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("b.jsonl.gz", gzip.compress(_MANY)[:-400]),
        ("b.jsonl.gz", _damaged(gzip.compress(_MANY))),
        ("b.jsonl.zst", _damaged(zst(_MANY))),
        ("b.jsonl.zst", zst(_MANY)[:-400]),
    ],
    ids=["cut gz", "damaged gz", "damaged zst", "cut zst"],
)
def test_a_file_that_breaks_off_is_reported_and_the_others_are_read(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / name).write_bytes(data)
    (tmp_path / "c.jsonl").write_bytes(LINES)
    documents, report = read(tmp_path)
    assert texts(documents)[:3] == texts(documents)[-3:] == [row["text"] for row in ROWS]
    assert report.bad_lines >= 1
    assert name in report.samples[0].where


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("b.jsonl.gz", b"this is no gzip"),
        ("b.jsonl.zst", b"this is no zstandard"),
        ("b.txt.gz", b"this is no gzip"),
        ("b.parquet", b"PAR1 this is no parquet PAR1"),
        ("b.parquet", b""),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InvalidArgument, match=rf"corpus: .*{name} cannot be read"):
        open_corpus([str(tmp_path)])


def test_a_line_too_long_for_memory_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 60)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"x" * 200 + b'"}\n' + LINES)
    documents, report = read(tmp_path / "a.jsonl")
    assert texts(documents) == [row["text"] for row in ROWS]
    assert "60 bytes" in report.samples[0].why


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


def test_a_field_that_the_first_documents_lack_is_looked_for_in_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"other": 1}\n' * 5000)
    (tmp_path / "b.jsonl").write_bytes(LINES)
    documents, report = read(tmp_path)
    assert len(documents) == 3
    assert report.bad_lines == 5000
