"""Every format of a corpus, and the lines in it that are bad."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest

from cbtm_common.errors import InvalidArgument
from cbtm_coordinator.clustering import formats
from cbtm_coordinator.clustering.corpus import Document, ReadReport, open_corpus
from tests.support.corpora import LINES, ROWS, parquet, read, texts, zst


def long_zst(data: bytes) -> bytes:
    """As `zstd --long=28` makes it, in a stream: the frame asks for a window of 256 MiB."""
    import zstandard

    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(data) + packer.flush()


SKIPPABLE_FRAME = bytes.fromhex("502a4d1805000000") + b"aside"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.json", LINES),
        ("a.ndjson", LINES),
        ("a.jsonl.gz", gzip.compress(LINES)),
        ("a.jsonl.zst", zst(LINES)),
        ("A.JSONL.GZ", gzip.compress(LINES)),
        ("a.jsonl.gz", b"".join(gzip.compress(line) for line in LINES.splitlines(keepends=True))),
        ("a.jsonl.zst", b"".join(zst(line) for line in LINES.splitlines(keepends=True))),
        ("a.jsonl.zst", zst(LINES[:30]) + SKIPPABLE_FRAME + zst(b"") + zst(LINES[30:])),
        ("a.jsonl.zst", long_zst(LINES)),
        ("a.jsonl", LINES.replace(b"\n", b"\r\n\n")),
        ("a.jsonl", b"\xef\xbb\xbf" + LINES),
        ("a.jsonl", LINES.rstrip(b"\n")),
    ],
    ids=[
        *(
            "jsonl",
            "json",
            "ndjson",
            "gz",
            "zst",
            "capitals",
            "gz members",
            "zst frames",
            "frames within lines",
            "long zst",
        ),
        *("blank lines", "byte order mark", "no last newline"),
    ],
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


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
def test_text_that_is_not_utf8_makes_a_bad_line(tmp_path: Path, name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    bad = b"caf\xe9"
    if name == "a.jsonl":
        (tmp_path / name).write_bytes(b'{"text": "good"}\n{"text": "' + bad + b'"}\n{"text": "better"}\n')
    elif name == "a.txt":
        for other, data in (("a.txt", b"good"), ("b.txt", bad), ("c.txt", b"better")):
            (tmp_path / other).write_bytes(data)
    else:
        buffers = pa.array([b"good", bad, b"better"]).buffers()
        pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 3, buffers)}), tmp_path / name)
    documents, report = read(tmp_path)
    assert texts(documents) == ["good", "better"]
    assert (report.bad_lines, report.broken) == (1, [])
    assert "is not UTF-8" in report.samples[0].why


def test_text_files_are_read_without_byte_order_mark_and_with_plain_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert texts(read(tmp_path)[0]) == ["one\ntwo\n"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_utf16_is_refused_with_the_command_that_converts_it(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(LINES.decode().encode("utf-16"))
    with pytest.raises(InvalidArgument, match=rf"corpus: .*{name} cannot be read: it is UTF-16.*iconv"):
        open_corpus([str(tmp_path)])


def test_only_some_of_many_bad_lines_are_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + "nonsense\n" * 500)
    _, report = read(tmp_path / "a.jsonl")
    assert report.bad_lines == 500
    assert len(report.samples) == 20


def test_a_line_too_long_for_memory_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 60)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"x" * 200 + b'"}\n' + LINES)
    documents, report = read(tmp_path / "a.jsonl")
    assert texts(documents) == [row["text"] for row in ROWS]
    assert "60 bytes" in report.samples[0].why


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"body": "x"}], {}, r"text-field: .*b\.parquet has no column 'text'; there are \['body'\]"),
        ([{"text": 3}], {}, r"text-field: column 'text' of .*b\.parquet is int64, not text"),
        ([{"text": b"x"}], {}, r"text-field: column 'text' of .*b\.parquet is binary, not text"),
        ([{"text": "x"}], {"id_field": "id"}, r"id-field: .*b\.parquet has no column 'id'"),
        (
            [{"text": "x", "id": 1.5}],
            {"id_field": "id"},
            r"id-field: column 'id' of .*b\.parquet is double, not text or",
        ),
    ],
)
def test_each_parquet_file_must_have_the_columns_and_their_types(
    tmp_path: Path, rows: list[dict[str, Any]], options: dict[str, str], message: str
) -> None:
    parquet(tmp_path / "a.parquet", ROWS)
    parquet(tmp_path / "b.parquet", rows)
    with pytest.raises(InvalidArgument, match=message):
        open_corpus([str(tmp_path)], **options)


def test_parquet_text_in_any_of_its_encodings_and_ids_that_are_numbers(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pa.array(["x", "y"])
    for name, column in (("a", rows.cast(pa.large_string())), ("b", rows.dictionary_encode())):
        pq.write_table(pa.table({"text": column, "id": pa.array([1, 2])}), tmp_path / f"{name}.parquet")
    documents, _ = read(tmp_path, id_field="id")
    assert [(document.id, document.text) for document in documents] == [("1", "x"), ("2", "y")] * 2


def test_a_missing_text_in_a_parquet_row_makes_a_bad_line(tmp_path: Path) -> None:
    documents, report = read(parquet(tmp_path / "a.parquet", [{"text": "x"}, {"text": None}, {"text": "y"}]))
    assert texts(documents) == ["x", "y"]
    assert report.samples[0].where == f"{tmp_path / 'a.parquet'}:2"


def test_a_row_group_of_a_parquet_file_is_never_in_memory_whole(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": ["some text " * 200] * 20_000})
    pq.write_table(table, tmp_path / "a.parquet", compression="none", use_dictionary=False)
    size = table.nbytes
    del table
    before, most = pa.total_allocated_bytes(), 0
    for _ in open_corpus([str(tmp_path)]).documents(ReadReport()):
        most = max(most, pa.total_allocated_bytes() - before)
    assert 0 < most < size / 4
