"""What the three command lines share: one clear line for an error, `--debug` for its traceback, tables as `--json`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from cbtm_common.cli_connection import hide_tokens
from cbtm_common.errors import CbtmError, InvalidArgument

USAGE_ERROR, ERROR, INTERRUPTED = 2, 1, 130


def run_app(app: typer.Typer, *, name: str) -> None:
    """Runs a typer application as the process: errors of ours become one line on stderr and an exit code.

    `--debug` (anywhere on the line) or `CBTM_DEBUG=1` shows tracebacks instead.
    """
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    hide_tokens(arguments)
    # Read when gRPC is imported: what its core says of broken handshakes and ports in use, we say in one clear line.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    debug = len(arguments) != len(sys.argv) - 1 or os.environ.get("CBTM_DEBUG") == "1"
    try:
        app(args=arguments, prog_name=name)
    except CbtmError as error:
        _fail(name, error.message, USAGE_ERROR if isinstance(error, InvalidArgument) else ERROR, debug)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing is wrong.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        _fail(name, "interrupted", INTERRUPTED, debug=False)
    except Exception as error:  # noqa: BLE001  # the edge of the process
        hint = "this is a defect of cbtm; run again with --debug for a traceback to report"
        _fail(name, f"{type(error).__name__}: {error}; {hint}", ERROR, debug)


def _fail(name: str, message: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    # One line, whatever a library put into the message.
    sys.stderr.write(f"{name}: error: {' '.join(message.split())}\n")
    sys.exit(code)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, as_json: bool) -> None:
    """Prints rows as a table, or as a JSON array of objects keyed by the columns' names."""
    if as_json:
        keys = [c.lower().replace(" ", "_").replace("/", "_per_") for c in columns]
        sys.stdout.write(json.dumps([dict(zip(keys, row, strict=True)) for row in rows], indent=1) + "\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", header_style="bold")
    for position, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[position], int | float) for row in rows)
        # An id that is cut in two cannot be copied.
        table.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=column == "ID")
    for row in rows:
        # As text: names and reasons come from others, and a bracket in them is not ours to interpret.
        table.add_row(*(Text(show_value(value)) for value in row))
    # Into a pipe or a file: as wide as it takes.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def write_output(text: str, out: Path | None) -> None:
    """To a file, or to standard output when none is named. Raises InvalidArgument."""
    if out is None:
        sys.stdout.write(text)
        return
    try:
        out.write_text(text, "utf-8")
    except OSError as error:
        raise InvalidArgument(f"out: {out} cannot be written ({error.strerror})", field="out") from error


def show_value(value: Any) -> str:
    """A value as a person reads it in a table."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def show_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def human_bytes(size: float) -> str:
    """1536 as '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def human_seconds(seconds: float) -> str:
    """5025 as '1 h 23 min'."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86_400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86_400} d {whole % 86_400 // 3600:02d} h"
