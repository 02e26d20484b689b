"""Reading a corpus: every format, what is bad in it, and what is said when there is nothing to read."""

from __future__ import annotations

import gzip
import json
import os
import random
from collections.abc import Callable
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


def long_zst(data: bytes) -> bytes:
    """As `zstd --long=28` makes it, in a stream: the frame asks for a window of 256 MiB."""
    import zstandard

    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(data) + packer.flush()


SKIPPABLE_FRAME = bytes.fromhex("502a4d1805000000") + b"aside"


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
def test_a_file_that_breaks_off_is_named_with_its_line_and_the_others_are_read(
    tmp_path: Path, name: str, data: bytes
) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / name).write_bytes(data)
    (tmp_path / "c.jsonl").write_bytes(LINES)
    documents, report = read(tmp_path)
    assert texts(documents)[:3] == texts(documents)[-3:] == [row["text"] for row in ROWS]
    assert report.bad_lines == 0
    (broken,) = report.broken
    line = int(broken.where.removeprefix(f"{tmp_path / name}:"))
    assert line == len(documents) - 6 + 1
    with pytest.raises(InvalidArgument, match=rf"corpus: 1 file\(s\) .*{name}:{line} cannot be read: .*; replace it"):
        report.check_whole()


def test_zst_that_is_cut_where_a_line_ends_is_not_taken_for_whole(tmp_path: Path) -> None:
    packed = zst(_MANY)
    (tmp_path / "a.jsonl.zst").write_bytes(zst(LINES) + packed[: len(packed) // 500])
    documents, report = read(tmp_path)
    assert texts(documents) == [row["text"] for row in ROWS]
    assert [broken.where for broken in report.broken] == [f"{tmp_path / 'a.jsonl.zst'}:4"]


def test_one_pass_finds_all_files_that_break_off(tmp_path: Path) -> None:
    cut = gzip.compress(_MANY)[:-400]
    for name in "abcde":
        (tmp_path / f"{name}.jsonl.gz").write_bytes(cut)
    _, report = read(tmp_path)
    with pytest.raises(InvalidArgument, match=r"5 file\(s\).*a\.jsonl\.gz.*b\.jsonl.*c\.jsonl.*; and 2 more") as caught:
        report.check_whole()
    assert caught.value.field == "corpus"


def test_a_corpus_that_is_whole_passes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES + b"nonsense\n")
    _, report = read(tmp_path)
    report.check_whole()


def _grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(LINES)


def _rewrite(path: Path) -> None:
    before = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes().swapcase())
    os.utime(path, ns=(before + 1_000_000, before + 1_000_000))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_grow, "changed from 144 to 288 bytes"),
        (lambda path: path.write_bytes(LINES[:50]), "changed from 144 to 50 bytes"),
        (_rewrite, "changed since"),
        (Path.unlink, "is gone"),
    ],
    ids=["grows", "is cut", "is rewritten", "is deleted"],
)
@pytest.mark.parametrize("early", [True, False], ids=["before it is read", "while it is read"])
def test_a_file_that_changes_is_noticed(
    tmp_path: Path, change: Callable[[Path], object], said: str, early: bool
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    corpus = open_corpus([str(tmp_path)])
    report = ReadReport()
    reading = corpus.documents(report)
    if not early:
        next(reading)
    change(path)
    list(reading)
    with pytest.raises(InvalidArgument, match=f"corpus: .*a.jsonl {said}.*nothing writes to it"):
        report.check_whole()


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


def test_a_damaged_page_of_a_parquet_file_with_checksums_is_noticed(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    assert len(read(path)[0]) == 3
    path.write_bytes(path.read_bytes().replace(b"number 1", b"number 7", 1))
    _, report = read(path)
    with pytest.raises(InvalidArgument, match=r"corpus: .*a\.parquet:1 cannot be read: .*; replace it"):
        report.check_whole()


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
