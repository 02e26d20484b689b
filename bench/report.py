"""What every benchmark prints: a table for people, and as its last line one JSON object for programs.

    {"bench": "routing", "figures": [{"name", "value", "unit", "bar", "met"}], "machine": {...}}

`bar` is null where a figure is only reported. Figures that compare are ratios measured in the same run.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from typing import Literal

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured number. `sense` says on which side of `bar` it is met."""

    name: str
    value: float
    unit: str
    bar: float | None = None
    sense: Literal["at least", "at most"] = "at least"

    @property
    def met(self) -> bool | None:
        if self.bar is None:
            return None
        return self.value >= self.bar if self.sense == "at least" else self.value <= self.bar


@dataclass(kw_only=True)
class Report:
    """Collects figures; `finish` prints them."""

    bench: str
    figures: list[Figure] = field(default_factory=list)

    def add(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        bar: float | None = None,
        sense: Literal["at least", "at most"] = "at least",
    ) -> None:
        self.figures.append(Figure(name=name, value=value, unit=unit, bar=bar, sense=sense))

    def finish(self) -> None:
        """Prints the table, then the JSON line."""
        table = Table(title=f"bench/{self.bench}")
        for column in ("figure", "value", "unit", "bar", "met"):
            table.add_column(column, justify="right" if column in ("value", "bar") else "left")
        for f in self.figures:
            bar = "" if f.bar is None else f"{f.sense} {f.bar:g}"
            met = {None: "", True: "yes", False: "no"}[f.met]
            table.add_row(f.name, f"{f.value:.4g}", f.unit, bar, met)
        Console(width=140).print(table)
        rows = [{k: v for k, v in asdict(f).items() if k != "sense"} | {"met": f.met} for f in self.figures]
        print(json.dumps({"bench": self.bench, "figures": rows, "machine": machine()}), flush=True)


def machine() -> dict[str, str | int | None]:
    """What the figures were measured on."""
    return {"cpus": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
