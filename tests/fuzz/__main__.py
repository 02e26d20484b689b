"""Feeds the readers of strangers' files with what hypothesis invents, for as long as told.

    python -m tests.fuzz [--minutes 10] [--seed N] [--target NAME]

Ends with a table and exit code 0, or with the smallest input that fails and exit code 1: add it to the target's
`examples`, so that it stays a test.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from tests.fuzz.targets import TARGETS, Target

_ROUND = 500


def fuzz(target: Target, number: int) -> int:
    """One round of inputs, drawn by `number`; how many were tried. Raises what the target raised on the smallest."""
    tried = 0

    @seed(number)
    @given(st.data())
    @settings(max_examples=_ROUND, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    def look(data: st.DataObject) -> None:
        nonlocal tried
        tried += 1
        target.check(data.draw(target.inputs))

    look()
    return tried


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=sorted(TARGETS))
    options = parser.parse_args()
    names = [options.target] if options.target else list(TARGETS)
    tried: Counter[str] = Counter()
    end = time.monotonic() + 60 * options.minutes
    number = options.seed
    while time.monotonic() < end:
        for name in names:
            try:
                tried[name] += fuzz(TARGETS[name], number)
            except BaseException:  # noqa: BLE001  # whatever it is, it is the finding
                print(f"{name}, seed {number}:", file=sys.stderr)
                traceback.print_exc()
                return 1
        number += 1
    table = Table("Target", "Inputs", title=f"No reader failed in {options.minutes:g} min")
    for name in names:
        table.add_row(name, f"{tried[name]:,}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
