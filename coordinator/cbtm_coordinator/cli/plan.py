"""`plan`: advice before a run is made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cbtm_common.errors import InvalidArgument
from cbtm_coordinator.cli.options import Json

if TYPE_CHECKING:
    from cbtm_coordinator.planning.advice import Advice, Question
    from cbtm_coordinator.planning.survey import Survey

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def plan(
    corpus: Annotated[list[str], typer.Option(help="File, folder or glob; may be given again.")],
    budget: Annotated[str, typer.Option(metavar="TOKENS", help="Training tokens of all phases together: 400M, 2B.")],
    parameters: Annotated[str, typer.Option(help="Of one model: 124M, 1.3B.")],
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Experts branch from a model that exists: no seed phase.")
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="Hub id or folder, to count tokens with; default a guess by characters.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file; batch and sequence length are taken of it.")] = None,
    text_field: Annotated[str, typer.Option(help="Field of the text in JSONL and Parquet.")] = "text",
    as_json: Json = False,
) -> None:
    """Advise clusters, seed fraction and steps, by what was measured, and say how sure that is.

    Reads the corpus once to count it. Needs no coordinator.
    """
    from rich.console import Console

    from cbtm_common.recipe import Recipe
    from cbtm_coordinator.clustering.corpus import open_corpus
    from cbtm_coordinator.create_run_display import progress_bars
    from cbtm_coordinator.planning.advice import Question, advise
    from cbtm_coordinator.planning.measurements import PUBLISHED, measurements
    from cbtm_coordinator.planning.survey import survey

    tokens, size = _number(budget, "budget"), _number(parameters, "parameters")
    steps_by = Recipe() if recipe is None else Recipe.from_toml(recipe)
    opened = open_corpus(corpus, text_field=text_field)
    counter = None if tokenizer is None else _tokenizer(tokenizer)
    with progress_bars(Console(stderr=True)) as bars:
        bar = bars.add_task("reading", total=opened.total_bytes, unit="bytes")
        found = survey(opened, counter, on_bytes=lambda read: bars.advance(bar, read))
    question = Question(
        budget_tokens=tokens,
        parameters=size,
        documents=found.documents,
        corpus_tokens=found.tokens,
        pretrained=pretrained,
        recipe=steps_by,
    )
    advice = advise(question, measurements(), PUBLISHED)
    if as_json:
        _show_json(found, question, advice)
    else:
        _show(found, question, advice)


def _number(text: str, field: str) -> int:
    """Such as 400M. Raises InvalidArgument."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMBT]?)", text.replace(",", "").replace("_", "").upper())
    value = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if value < 1:
        raise InvalidArgument(f"{field}: {text!r} is not a number above 0, such as 400M or 1.3B", field=field)
    return value


def _tokenizer(source: str) -> Any:
    import tempfile

    from cbtm_coordinator.clustering.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as scratch:
        return load_tokenizer(source, Path(scratch))


def _show_json(found: Survey, question: Question, advice: Advice) -> None:
    from dataclasses import asdict

    from cbtm_common.cli import show_json

    asked = {
        "budget_tokens": question.budget_tokens,
        "parameters": question.parameters,
        "pretrained": question.pretrained,
        "step_tokens": question.recipe.step_tokens(),
    }
    show_json({"corpus": asdict(found), "question": asked, "advice": asdict(advice)})


def _show(found: Survey, question: Question, advice: Advice) -> None:
    from cbtm_common.cli import human_bytes

    counted = "counted on a sample" if found.sampled else "a guess by characters; --tokenizer counts"
    lines = [
        f"Corpus: {found.documents:,} documents, {human_bytes(found.size)}, {found.tokens:,} tokens ({counted})",
        f"Advice, with {advice.confidence} confidence: "
        + (f"--clusters {advice.clusters}" if advice.clusters > 1 else "one dense model, no experts"),
    ]
    if advice.clusters > 1:
        recipe = question.recipe
        lines += [
            "",
            f"steps = {advice.steps}    # of each expert: {advice.expert_tokens:,} tokens, in steps of "
            f"{recipe.global_batch} x {recipe.sequence_length}",
            *([] if question.pretrained else ["[seed_phase]", f"fraction = {advice.seed_fraction:g}"]),
            "[routing]",
            'router = "learned"',
        ]
    lines += ["", "Why:", *(f"- {reason}" for reason in advice.reasons)]
    lines += ["", "Mind:", *(f"- {warning}" for warning in advice.warnings)] if advice.warnings else []
    typer.echo("\n".join(lines))
