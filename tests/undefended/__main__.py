"""`python -m tests.undefended [NAME …]`: for each defence, a copy of the project without it, and its tests there.

A table says whether they failed, as they have to; the exit code is 1 when a defence is not missed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.undefended.defences import DEFENCES, ROOT, Defence

_PACKAGES = ("common", "coordinator", "worker", "client")
_SECONDS = 280
# pytest's exit code when tests were run, and some failed.
_FAILED = 1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """`is_missed`: tests ran, and one failed. `said`: pytest's last line."""

    defence: Defence
    is_missed: bool
    said: str


def try_without(defence: Defence, copy: Path) -> Outcome:
    """Runs the tests in `copy`, a copy of the project, with the defence taken out for as long."""
    path = copy / defence.path
    whole = path.read_text("utf-8")
    path.write_text(whole.replace(defence.line, defence.without), "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", "--tb=line", "-rN"]
    paths = [*(str(copy / package) for package in _PACKAGES), str(copy)]
    try:
        done = subprocess.run(
            [*command, defence.test_path, "-k", defence.named],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Outcome(defence=defence, is_missed=False, said=f"no end within {_SECONDS} s")
    finally:
        path.write_text(whole, "utf-8")
    last = (done.stdout.strip() or done.stderr.strip()).rpartition("\n")[2]
    return Outcome(defence=defence, is_missed=done.returncode == _FAILED, said=last)


def chosen(names: Sequence[str]) -> list[Defence]:
    """Of these names, or all. Raises SystemExit for one that is not known."""
    known = {defence.name for defence in DEFENCES}
    unknown = sorted(set(names) - known)
    if unknown:
        raise SystemExit(f"there is no defence {unknown[0]!r}: {', '.join(sorted(known))}")
    return [defence for defence in DEFENCES if not names or defence.name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="defences; default all")
    wanted = chosen(parser.parse_args().names)
    console = Console()
    table = Table("Defence", "Taken out of", "Its tests", "Missed", "pytest")
    survivors = 0
    with TemporaryDirectory() as name:
        copy = Path(name) / "project"
        skipped = shutil.ignore_patterns(".venv", ".git", "*-out", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=skipped)
        for defence in track(wanted, description="defences", console=console):
            outcome = try_without(defence, copy)
            survivors += not outcome.is_missed
            tests = f"{defence.tests} -k {defence.named!r}"
            missed = "yes" if outcome.is_missed else "[bold red]NO[/bold red]"
            table.add_row(defence.name, defence.path, tests, missed, outcome.said)
    console.print(table)
    console.print(f"{len(wanted) - survivors} of {len(wanted)} defences are missed by a test")
    sys.exit(1 if survivors else 0)


if __name__ == "__main__":
    main()
