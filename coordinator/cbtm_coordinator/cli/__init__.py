"""`cbtm-coord`: the run owner's command line. Commands import what they need when they run, so `--help` is quick."""

from __future__ import annotations

from cbtm_common.cli import run_app
from cbtm_coordinator.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    run_app(app, name="cbtm-coord")
