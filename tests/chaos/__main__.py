"""Proves that nothing is lost, whatever fails: a storm of faults over a whole system, and every invariant checked.

    python -m tests.chaos [--seconds 600] [--seed N] [--logs FOLDER]        (make chaos SECONDS=600 SEED=N)

Two coordinators on one PostgreSQL, SeaweedFS behind a proxy that fails, six workers. The same seed gives the same
faults at the same times. Ends with a table and a line of JSON; exit code 1 when an invariant was violated, with the
evidence, and the processes' logs kept.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench.report import Report
from tests.chaos.site import calm_experts, parts
from tests.chaos.storm import Outcome, Storm

# One fault in so many seconds, on average.
EVERY = 1.6
_BAR = 200
CALM_SECONDS = 240.0


def weather(
    seed: int,
    *,
    seconds: float,
    every: float,
    folder: Path,
    calm_seconds: float = CALM_SECONDS,
    progress: Progress | None = None,
) -> Outcome:
    """A calm run for comparison, then the storm. Logs and caches lie in `folder`.

    The calm run, and what is left to do after the storm, may each take `calm_seconds`.
    """
    with parts(seed, folder=folder) as made:
        undisturbed = calm_experts(made, seconds=calm_seconds)
        bar = progress.add_task("", total=seconds) if progress else None
        begun: list[float] = []
        with made.copy("storm") as site:
            site.start_coordinators()
            site.start_workers()

            def on_fault(outcome: Outcome) -> None:
                if progress is not None and bar is not None:
                    begun.append(1)
                    text = f"{outcome.survived + made.store_proxy.injected.total()} faults"
                    progress.update(bar, advance=every, description=text)

            storm = Storm(site, undisturbed, calm_seconds=calm_seconds)
            return storm.rage(seed, seconds=seconds, every=every, on_fault=on_fault)


def show(outcome: Outcome, console: Console) -> None:
    for title, counts in (
        ("Faults", outcome.faults),
        ("Faults of transfers", outcome.transfers),
        ("Ended by themselves, started again", outcome.ended),
        ("Leases", outcome.leases),
        ("Checkpoints", outcome.checkpoints),
    ):
        _print(console, title, counts)
    console.print(
        f"Looked {outcome.looks} times at the registry; {outcome.tasks_done} experts, each compared bit for bit."
    )


def _print(console: Console, title: str, counts: Mapping[str, int]) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("times", justify="right")
    for name, count in sorted(counts.items()):
        table.add_row(name, f"{count}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long faults come")
    parser.add_argument("--seed", type=int, default=None, help="of the schedule; drawn and printed when not given")
    parser.add_argument(
        "--logs", type=Path, default=None, help="where logs are written; a temporary folder if not given"
    )
    options = parser.parse_args()
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    folder = options.logs or Path(tempfile.mkdtemp(prefix="cbtm-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(width=120)
    console.print(f"seed {seed}, {options.seconds:.0f} s of faults after a calm run; logs in {folder}")
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console) as progress:
        outcome = weather(seed, seconds=options.seconds, every=EVERY, folder=folder, progress=progress)
    show(outcome, console)
    for violation in outcome.violations:
        console.print(f"VIOLATED: {violation}", markup=False, soft_wrap=True)
    report = Report(bench="chaos")
    report.add("faults survived", outcome.survived, "", bar=_BAR if options.seconds >= 600 else None)
    report.add("violations", len(outcome.violations), "", bar=0, sense="at most")
    report.add("experts, bit for bit those of a calm run", outcome.tasks_done, "")
    report.add("leases", outcome.leases.total(), "")
    report.add("checkpoints", outcome.checkpoints.total(), "")
    report.add("seed", seed, "")
    report.finish()
    if outcome.violations:
        console.print(f"Again with: make chaos SECONDS={options.seconds:.0f} SEED={seed}")
        sys.exit(1)


if __name__ == "__main__":
    main()
