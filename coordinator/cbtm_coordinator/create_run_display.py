"""What `run create` shows while it makes a run: bars for its steps, and the table of its clusters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from cbtm_common.cli import human_bytes
from cbtm_coordinator.clustering.fit import FitResult
from cbtm_coordinator.clustering.progress import ClusterStats


def cluster_table(fitted: FitResult, stats: Sequence[ClusterStats]) -> Table:
    """What came of the clustering: sizes by cluster, and the terms that set each apart."""
    table = Table(header_style="bold")
    for name in ("Cluster", "Documents", "Tokens", "Share"):
        table.add_column(name, justify="right")
    table.add_column("Top terms")
    total = sum(s.tokens for s in stats)
    for index, s in enumerate(stats):
        row = (str(index), f"{s.documents:,}", f"{s.tokens:,}", f"{100 * s.tokens / total:.1f} %")
        table.add_row(*row, escape(", ".join(fitted.top_terms[index][:8])))
    return table


class _Amount(ProgressColumn):
    """Done of total: bytes as a person reads them, where the task has that unit."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        if task.fields.get("unit") == "share":
            return Text(f"{100 * task.completed / task.total:.0f} %")
        show = human_bytes if task.fields.get("unit") == "bytes" else "{:,.0f}".format
        return Text(f"{show(task.completed)} of {show(task.total)}")


def progress_bars(console: Console) -> Progress:
    """For tasks that count something, with field `unit` "bytes" or "share" where it is that."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        _Amount(),
        TimeRemainingColumn(),
        console=console,
    )


def show_steps(bars: Progress, name: str) -> tuple[TaskID, Callable[[str, float], None]]:
    """A bar for work that comes in steps, and what tells it of them: which, and the share of it that is done."""
    bar = bars.add_task(name, total=None, unit="share")
    doing = ""

    def report(what: str, share: float) -> None:
        nonlocal doing
        if what != doing:
            # What is left of one step says nothing of the next.
            bars.reset(bar, description=f"{name}: {what}", total=1)
            doing = what
        bars.update(bar, completed=share)

    return bar, report
