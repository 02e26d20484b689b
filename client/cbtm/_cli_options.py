"""What the commands of `cbtm` share: their options, where the experts come from, texts from files, progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cbtm_common.errors import InvalidArgument

if TYPE_CHECKING:
    from cbtm._ensemble import Ensemble, TopK
    from cbtm._scored import Progress

Folder = Annotated[Path | None, typer.Option("--ensemble", "-e", help="Folder that `cbtm save` wrote.")]
Coordinator = Annotated[
    str | None, typer.Option("--coordinator", envvar="CBTM_COORDINATOR", help="HOST:PORT of the coordinator.")
]
RunName = Annotated[str | None, typer.Option("--run", help="Name or id of the run.")]
Token = Annotated[str | None, typer.Option("--token", envvar="CBTM_TOKEN", help="A consumer's token.")]
TopKOption = Annotated[str | None, typer.Option("--top-k", help="Experts mixed at each token: a number, or all.")]
Temperature = Annotated[float | None, typer.Option("--routing-temperature", help="T of the routing weights.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda:0, …")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, …; default as stored.")]
Budget = Annotated[int | None, typer.Option("--max-experts", help="Most experts in memory at a time.")]
CacheDir = Annotated[Path | None, typer.Option("--cache-dir", help="Where downloads are kept.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def read_texts(path: Path, field: str) -> Iterator[str]:
    """Texts of a JSON-lines file (`field` of each line), or a text file as one. Raises InvalidArgument."""
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix != ".jsonl":
                yield file.read()
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _field_of(line, field, where=f"{path}:{number}")
    except FileNotFoundError:
        raise InvalidArgument(f"texts: there is no file {path}", field="texts") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"texts: {path} cannot be read: {error}", field="texts") from error


def read_lines(path: Path, field: str) -> Iterator[str]:
    """Texts of a JSON-lines file, or the lines of a text file, blank ones left out. Raises InvalidArgument."""
    for text in read_texts(path, field):
        yield from [text] if path.suffix == ".jsonl" else (line for line in text.splitlines() if line.strip())


def _field_of(line: str, field: str, *, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InvalidArgument(f"texts: {where}: not JSON: {error}", field="texts") from error
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        has = ", ".join(sorted(record)) if isinstance(record, dict) else "no object"
        raise InvalidArgument(f"texts: {where}: no text in field {field!r}; it has {has}", field="texts")
    return text


def open_ensemble(
    folder: Path | None,
    coordinator: str | None,
    run: str | None,
    token: str | None,
    cache_dir: Path | None,
    **options: Any,
) -> Ensemble:
    from cbtm._ensemble import Ensemble

    if folder is not None:
        return Ensemble.load(folder, **options)
    if coordinator is None or run is None:
        raise InvalidArgument(
            "ensemble: say where the experts are: a saved folder, or --coordinator HOST:PORT and --run NAME",
            field="ensemble",
        )
    return Ensemble.from_coordinator(coordinator, run=run, token=token, cache_dir=cache_dir, **options)


def parse_top_k(text: str | None) -> TopK:
    if text is None:
        return None
    if text == "all":
        return "all"
    return parse_numbers(text)[0]


def parse_numbers(text: str, *, field: str = "top_k") -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidArgument(f"{field}: {text!r} is not a number, or numbers with commas", field=field) from None


def parse_floats(text: str, *, field: str) -> list[float]:
    """Numbers with commas between; none of an empty text. Raises InvalidArgument."""
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InvalidArgument(f"{field}: {text!r} are not numbers with commas", field=field) from None


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def progress_bars(*, quiet: bool) -> Iterator[Progress | None]:
    """A bar for each model that is run, on standard error; none when `quiet` or not at a terminal."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    with Bars(console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def told(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name)
            bars.update(tasks[name], completed=done, total=total)

        yield told
