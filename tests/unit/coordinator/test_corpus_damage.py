"""Corpora with files that break off, change while they are read, or are not what their name says."""

from __future__ import annotations

import gzip
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from cbtm_common.errors import InvalidArgument
from cbtm_coordinator.clustering.corpus import ReadReport, open_corpus
from tests.support.corpora import LINES, ROWS, read, texts, zst


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
