"""`python -m bench.reproduce`: trains the study's contenders, scores them, and writes what came of it.

Interrupt it at any time: the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from types import FrameType

from rich.console import Console

from bench.report import Report
from bench.reproduce import show
from bench.reproduce.corpus import cut
from bench.reproduce.findings import Examiner, Findings, learned_top_1
from bench.reproduce.grid import SIZES, Plan, Size
from bench.reproduce.mixing import perplexity
from bench.reproduce.scores import Documents, Reader, Scores
from bench.reproduce.site import Site
from bench.reproduce.training import Experts, train
from cbtm_common.cli import human_seconds
from cbtm_common.errors import CbtmError
from examples.demo.processes import ProcessFailed

_SAMPLE = 30_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.reproduce", description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="FOLDER/train of `python -m bench.corpus FOLDER`")
    parser.add_argument("--out", type=Path, default=Path("reproduce-out"), help="everything that is made on the way")
    parser.add_argument("--results", type=Path, help="folder for tables and figures (default: OUT/results)")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--full", action="store_true", help="three seeds, the whole grid, K = 25 too")
    options = parser.parse_args()
    console = Console()
    signal.signal(signal.SIGTERM, _interrupt)
    plan = Plan(size=SIZES[options.size], seeds=(0, 1, 2) if options.full else (0,), full=options.full)
    try:
        study(plan, options.corpus, options.out, options.results or options.out / "results", console)
    except KeyboardInterrupt:
        console.print("[yellow]stopped; the same command goes on from here[/]")
        return 130
    except (ProcessFailed, CbtmError) as error:
        console.print(f"[red]the study stopped:[/] {error}", highlight=False)
        return 1
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def study(plan: Plan, source: Path, out: Path, results: Path, console: Console) -> Findings:
    """All of it; the results are written to `results`."""
    import torch

    size = plan.size
    torch.set_num_threads(size.workers * size.threads)
    spent = Spent(out / "seconds.json")
    corpus = cut(source, out / "corpus", domain_bytes=size.domain_bytes)
    total = plan.units() * size.tokens
    console.print(
        f"{size.name}: {total / 1e6:,.0f} million training tokens in {plan.units():g} parts of {size.tokens:,}; "
        "interrupt it at any time"
    )
    findings = Findings()
    with Site(out, size, total_tokens=total, console=console) as site, spent:
        reader = Reader(site.target, site.token, site.cache, device=size.device)
        parameters = 0
        for seed in plan.seeds:
            held_out = HeldOut(site, size, out / "scores" / f"s{seed}", reader)
            trained = train(
                site,
                plan,
                corpus,
                seed=seed,
                validate=held_out.validate,
                validate_experts=held_out.validate_experts,
                seed_of=reader.seed_dir,
                tokenizer_of=reader.tokenizer_dir,
            )
            documents, scores = held_out.of(trained.host, trained.host)
            examiner = Examiner(
                findings, reader, scores, documents, seed=seed, sample=lambda: _sample(corpus), say=console.print
            )
            examiner.examine(trained)
            with reader.open(trained.host) as model:
                parameters = model.pool.get(0).num_parameters()
    about = {
        "size": size.name,
        "parameters": parameters,
        "tokens": size.tokens,
        "sequence_length": size.sequence_length,
        "seeds": list(plan.seeds),
        "paper_batch": size.paper_batch,
        "date": date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {size.workers} workers on {size.device}",
        "duration": f"{human_seconds(spent.total)} in all",
    }
    commands = [" ".join(["python -m bench.reproduce", *_shown(sys.argv[1:])])]
    show.write(findings, about, commands, results)
    console.print(show.markdown(findings, about, commands), highlight=False, markup=False)
    console.print(f"tables and figures are in {results}")
    report = Report(bench="reproduce")
    show.figures(findings, report)
    report.finish()
    return findings


class HeldOut:
    """One seed's held-out documents, once their run is trained, and what models say of them."""

    def __init__(self, site: Site, size: Size, folder: Path, reader: Reader) -> None:
        self._reader = reader
        self._site = site
        self._size = size
        self._folder = folder
        self._found: tuple[Documents, Scores] | None = None

    def of(self, host: str, complete: str) -> tuple[Documents, Scores]:
        if self._found is None:
            site, size = self._site, self._size
            documents = Documents.of(
                site.target,
                host,
                site.token,
                site.cache,
                beside=complete,
                limits=size.documents,
                tokens=size.document_tokens,
            )
            self._found = documents, Scores(self._folder, documents, window=size.sequence_length)
        return self._found

    def validate(self, run: str, host: str) -> float:
        """Validation perplexity of a dense run."""
        documents, scores = self.of(host, run)
        return perplexity(self._reader.dense(run, scores), documents).validation

    def validate_experts(self, experts: Experts, host: str) -> float:
        """Validation perplexity of the one expert that the learned router takes at each token."""
        documents, scores = self.of(host, host)
        return learned_top_1(experts, self._reader, scores, documents).validation


def _shown(arguments: Sequence[str]) -> list[str]:
    """Arguments without this machine's folders."""
    shown, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
            shown.append("FOLDER")
            continue
        skip = argument in ("--corpus", "--out", "--results")
        shown.append(argument)
    return shown


def _sample(corpus: Path) -> list[str]:
    with corpus.open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    return texts[:: max(1, len(texts) // _SAMPLE)]


class Spent:
    """Seconds of all calls together, kept in a file: a study that was interrupted says what it took."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = float(json.loads(path.read_text("utf-8"))) if path.exists() else 0.0
        self._started = time.monotonic()

    @property
    def total(self) -> float:
        return self._before + time.monotonic() - self._started

    def __enter__(self) -> Spent:
        return self

    def __exit__(self, *_: object) -> None:
        self._path.write_text(json.dumps(self.total), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
