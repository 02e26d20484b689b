"""Building a corpus out of packages made here: fetched, read, interrupted, refused."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from bench.corpus import __main__ as command
from bench.corpus.archives import read_files, read_inner_tar
from bench.corpus.build import Settings, build, decode
from bench.corpus.formats import FORMATS
from bench.corpus.packages import PackageCache
from bench.corpus.sources import Catalogue, Package
from cbtm_common.errors import AlreadyExists, IntegrityError, InvalidArgument, InvalidState, NotFound, Unavailable

SENTENCE = "This is sentence number {} of the text, which is made up, and says no more than that it is there. "
TEXT = "\n\n".join(SENTENCE.format(i) * 3 for i in range(60))
IN_BOTH = "A text that both packages have, " * 10
TOML = """
[packages.pypi]
prose = "1.0"
[packages.npm]
code = "2.0"

[domains.a_prose]
licence = "CC0-1.0"
[[domains.a_prose.sources]]
packages = ["pypi:prose"]
under = "prose/texts"
match = '\\.txt$'
drop = "bad"
format = "plain"
address = "{name}"

[domains.b_code]
licence = "MIT"
cap_mb = 0.005
[[domains.b_code.sources]]
packages = ["npm:code"]
match = '\\.js$'
format = "code"
"""


def tgz(files: dict[str, str]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return made.getvalue()


def nothing(doing: str, done: int, of: int) -> None:
    pass


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Two domains, whose packages are in the cache. Each has a text of its own, and one that both have."""
    (tmp_path / "sources.toml").write_text(TOML)
    for index in ("pypi", "npm"):
        (tmp_path / "cache" / index).mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "cache" / "pypi" / "prose-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("prose/texts/one.txt", TEXT)
        wheel.writestr("prose/texts/short.txt", IN_BOTH)
        wheel.writestr("prose/texts/bad.txt", TEXT.replace("text", "bad"))
        wheel.writestr("elsewhere/two.txt", TEXT.replace("text", "other"))
    code = {"package/copy.js": IN_BOTH, "package/own.js": TEXT.replace("text", "program")}
    (tmp_path / "cache" / "npm" / "code-2.0.tgz").write_bytes(tgz(code))
    catalogue = Catalogue.load(tmp_path / "sources.toml")
    return Settings.choose(catalogue, tmp_path / "out", tmp_path / "cache", 6.0, [])


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_catalogue_is_whole() -> None:
    catalogue = Catalogue.load()
    assert len(catalogue.domains) == 25
    assert {package for domain in catalogue.domains.values() for package in domain.packages} == set(catalogue.packages)
    for domain in catalogue.domains.values():
        assert domain.licence
        assert domain.sources
        for source in domain.sources:
            assert source.format in FORMATS
            assert source.address.format(path="folder/file", name="file", section="1")
            for pattern in (source.match, source.drop, source.archive):
                re.compile(pattern)


def test_a_corpus_and_its_manifest(settings: Settings) -> None:
    manifest = build(settings, nothing)
    out = settings.out
    assert manifest == json.loads((out / "manifest.json").read_text())
    prose, code = manifest["domains"]
    assert (prose["domain"], prose["licence"], prose["text_bytes"]) == ("a_prose", "CC0-1.0", prose["available_bytes"])
    written = [*lines(out / "train" / "a_prose.jsonl"), *lines(out / "valid" / "a_prose.jsonl")]
    assert len(written) == prose["docs"] == prose["train"] + prose["valid"]
    assert {d["source"].split("#")[0] for d in written} == {"pypi:prose==1.0:one.txt", "pypi:prose==1.0:short.txt"}
    assert {d["domain"] for d in written} == {"a_prose"}
    assert set(re.findall(r"number (\d+) of", " ".join(d["text"] for d in written))) == set(map(str, range(60)))
    # The limit is the domain's own, and no document is in two domains.
    assert 5_000 <= code["text_bytes"] < code["available_bytes"]
    assert code["sha256"] == hashlib.sha256((out / "train" / "b_code.jsonl").read_bytes()).hexdigest()
    texts = [d["text"] for path in out.rglob("*.jsonl") for d in lines(path)]
    assert texts.count(IN_BOTH.strip()) == 1
    wheel = settings.cache / "pypi" / "prose-1.0-py3-none-any.whl"
    assert manifest["packages"]["pypi:prose"] == {
        "version": "1.0",
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "bytes": wheel.stat().st_size,
    }
    assert set(contents(out)) == {
        "manifest.json",
        *(f"{p}/{d}.jsonl" for p in ("train", "valid") for d in ("a_prose", "b_code")),
    }


def test_an_interrupted_build_goes_on_and_ends_the_same(settings: Settings, tmp_path: Path) -> None:
    def interrupt(doing: str, done: int, of: int) -> None:
        if doing == "building b_code":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(settings, interrupt)
    assert not (settings.out / "manifest.json").exists()
    # What is finished needs its packages no more.
    wheel = settings.cache / "pypi" / "prose-1.0-py3-none-any.whl"
    wheel.rename(tmp_path / "prose.whl")
    said: list[str] = []
    build(settings, lambda doing, done, of: said.append(doing))
    assert said[0] == "fetching npm:code"
    resumed = contents(settings.out)
    (tmp_path / "prose.whl").rename(wheel)
    shutil.rmtree(settings.out)
    build(settings, nothing)
    assert contents(settings.out) == resumed


def test_other_settings_do_not_continue_a_build_and_a_corpus_is_not_overwritten(settings: Settings) -> None:
    def interrupt(doing: str, done: int, of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(settings, interrupt)
    catalogue = Catalogue.load(settings.cache.parent / "sources.toml")
    with pytest.raises(InvalidState, match="other settings"):
        build(Settings.choose(catalogue, settings.out, settings.cache, 1.0, []), nothing)
    build(settings, nothing)
    with pytest.raises(AlreadyExists):
        build(settings, nothing)


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    catalogue = Catalogue.load()
    with pytest.raises(InvalidArgument, match="no domain sports; there are code_c, "):
        Settings.choose(catalogue, tmp_path, tmp_path, 6.0, ["sports", "code_c"])
    with pytest.raises(InvalidArgument, match="cap-mb"):
        Settings.choose(catalogue, tmp_path, tmp_path, 0.0, [])


def fake_tool(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_a_package_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made.tgz").write_bytes(tgz({"package/a.js": "x"}))
    fake_tool(tmp_path / "bin", "npm", f'echo "$@" >> {tmp_path}/calls; cp {tmp_path}/made.tgz code-2.0.tgz')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    package = Package(index="npm", name="code", version="2.0")
    for _ in range(2):
        fetched = PackageCache(tmp_path / "cache").fetch(package)
    assert fetched.tag == "npm:code@2.0"
    assert (tmp_path / "calls").read_text() == "pack --loglevel=error code@2.0\n"
    assert list((tmp_path / "cache" / "npm").iterdir()) == [fetched.path]


def test_a_version_that_debian_replaced_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_tool(tmp_path / "bin", "apt-get", 'case "$2" in *=*) exit 100;; esac; echo deb > "$2_1%3a2.1_all.deb"')
    fake_tool(tmp_path / "bin", "dpkg-deb", "echo 1:2.1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    fetched = PackageCache(tmp_path / "cache").fetch(Package(index="deb", name="doc", version="2.0"))
    assert fetched.tag == "deb:doc=1:2.1"
    assert "version 2.0 is not to be had" in fetched.record()["note"]


def test_a_failed_download_leaves_nothing_and_says_what_the_tool_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_tool(tmp_path / "bin", "npm", "echo half > code-2.0.tgz; echo no network >&2; exit 7")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    with pytest.raises(Unavailable, match=r"npm:code cannot be had: npm pack .* ended with 7: no network"):
        PackageCache(tmp_path / "cache").fetch(Package(index="npm", name="code", version="2.0"))
    assert list((tmp_path / "cache" / "npm").iterdir()) == []


def test_a_missing_tool_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = [str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--only", "code_javascript"]
    monkeypatch.setattr(sys, "argv", ["corpus", *arguments])
    assert command.main() == 1
    said = capsys.readouterr().err
    assert "npm is not installed: it is needed for npm:eslint" in said
    assert "Traceback" not in said


def test_files_come_in_the_order_of_their_paths_and_hard_links_are_files(tmp_path: Path) -> None:
    archive = tmp_path / "a.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in (("./b/x", b"1"), ("./c", b"2"), ("./a/d/y", b"3"), ("./a/z", b"4")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, kind in (("./hard", tarfile.LNKTYPE), ("./soft", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "./a/z"
            tar.addfile(info)
    found = list(read_files(archive, lambda path: path != "b/x"))
    assert found == [("a/d/y", b"3"), ("a/z", b"4"), ("c", b"2"), ("hard", b"4")]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_a_package_of_debian_is_read_without_unpacking_it(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: doc\nVersion: 1:2-3\nArchitecture: all\nMaintainer: a <a@b.example>\nDescription: d\n"
    )
    (root / "usr" / "doc").mkdir(parents=True)
    (root / "usr" / "doc" / "page").write_text("page")
    (root / "usr" / "doc" / "link").symlink_to("page")
    with tarfile.open(root / "usr" / "inner.tar.xz", "w:xz") as tar:
        tar.add(root / "DEBIAN" / "control", "inner/control")
    (tmp_path / "deb").mkdir()
    build_it = ["dpkg-deb", "--root-owner-group", "--build", str(root), str(tmp_path / "deb" / "doc_2-3_all.deb")]
    subprocess.run(build_it, check=True, capture_output=True)
    fetched = PackageCache(tmp_path).fetch(Package(index="deb", name="doc", version="*"))
    assert fetched.tag == "deb:doc=1:2-3"
    (_, inner), page = read_files(fetched.path, lambda path: True)
    assert page == ("usr/doc/page", b"page")
    ((path, content),) = read_inner_tar(inner, lambda path: True)
    assert (path, content) == ("inner/control", (root / "DEBIAN" / "control").read_bytes())


def test_a_damaged_package_names_its_file(tmp_path: Path) -> None:
    for name in ("a.whl", "a.tgz", "a.deb"):
        (tmp_path / name).write_bytes(b"damaged")
        if name == "a.deb" and shutil.which("dpkg-deb") is None:
            continue
        with pytest.raises(IntegrityError, match=f"{name} cannot be read .* delete it"):
            list(read_files(tmp_path / name, lambda path: True))


def test_text_is_utf_8_or_else_latin_1() -> None:
    assert decode("a.txt", "é".encode()) == "é"
    assert decode("a.txt", "é".encode("latin-1")) == "é"


def test_a_release_that_lacks_the_files_is_said(settings: Settings) -> None:
    (settings.cache / "npm" / "code-2.0.tgz").write_bytes(tgz({"package/readme": TEXT}))
    with pytest.raises(NotFound, match="b_code: its packages have no text"):
        build(settings, nothing)
