"""Files by path, length and digest; paths that must not leave their set."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from cbtm_common.errors import InvalidArgument
from cbtm_common.files import FileSpec, check_relative, describe, hash_file, safe_join, strip_prefix


def test_a_file_survives_the_way_through_its_message() -> None:
    file = FileSpec(path="model/config.json", key="runs/r/model/config.json", size=3, sha256="ab" * 32)
    assert FileSpec.from_proto(file.to_proto()) == file


def test_hashing_reads_the_whole_file(tmp_path: Path) -> None:
    data = b"x" * (3 << 20) + b"end"
    (tmp_path / "f").write_bytes(data)
    assert hash_file(tmp_path / "f") == (len(data), hashlib.sha256(data).hexdigest())


def test_a_directory_is_described_sorted_by_path_whatever_its_depth(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", "a-b.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    files = describe(tmp_path)
    assert [f.path for f in files] == sorted(f.path for f in files) == ["a-b.txt", "a/b/c.txt", "a/z.txt", "b.txt"]
    assert files[0].sha256 == hashlib.sha256(b"a-b.txt").hexdigest()
    assert {f.key for f in files} == {""}


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "..", "a/../b", "a//b", "a/./b", "./a", "a/", "a\\b", "C:/x", "a\0b", "."]
)
def test_paths_that_are_not_plain_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        safe_join(tmp_path, path)
    assert caught.value.field == "path"


@pytest.mark.parametrize("path", ["a", "a/b.c", ".hidden", "..a", "a b/c", "é/ü"])
def test_plain_paths_pass(tmp_path: Path, path: str) -> None:
    assert check_relative(path) == path
    assert safe_join(tmp_path, path) == tmp_path / path


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "link").symlink_to(tmp_path)
    with pytest.raises(InvalidArgument, match="leads out"):
        safe_join(tmp_path / "base", "link/file")


def test_a_prefix_is_stripped_from_the_files_under_it_alone() -> None:
    files = [FileSpec(path=p, size=1, sha256="0" * 64, key=f"k/{p}") for p in ("model/a", "model/b/c", "models/d", "e")]
    stripped = strip_prefix(files, "model")
    assert [(f.path, f.key) for f in stripped] == [("a", "k/model/a"), ("b/c", "k/model/b/c")]
