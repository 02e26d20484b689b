"""`python -m examples.demo`: a coordinator, two workers, a seed, four experts, a dense baseline, and the outcome."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import shutil
import signal
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import Progress, TaskID
from rich.text import Text

from cbtm_common.cli import human_seconds
from cbtm_common.errors import CbtmError
from cbtm_common.rpc import Connection, connect
from examples.demo.processes import Processes, ProcessFailed
from examples.demo.show import show

HERE = Path(__file__).parent
CORPUS = HERE.parent / "corpus"
RUN, BASELINE, CLUSTERS = "demo", "demo-dense", 4
SENTENCES = (
    "She smiled and said that she would walk to the village with her sister after dinner.",
    "The Congress of the United States has appropriated funds for the defense of the nation.",
    "pub fn insert(&mut self, key: K, value: V) -> Option<V> { self.map.insert(key, value) }",
    "|- ( ( A e. RR /\\ B e. RR ) -> ( A + B ) e. RR )",
)
PROMPT = "The government of the United States"
# Worker processes share the machine's cores; each takes one.
WORKERS = 2
_POLL_SECONDS = 1.0
# Held-out tokens of each cluster that every model scores.
MAX_TOKENS = 10_000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="result folder, made anew")
    parser.add_argument("--corpus", default=str(CORPUS / "*.jsonl.gz"))
    parser.add_argument("--recipe", type=Path, default=HERE / "recipe.toml")
    parser.add_argument("--model", type=Path, default=HERE / "model.json")
    options = parser.parse_args()
    console = Console()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run_demo(options.out, options.corpus, options.recipe, options.model, console)
    except KeyboardInterrupt:
        console.print("[yellow]stopped; everything that the demo started has ended[/]")
        return 130
    except (ProcessFailed, CbtmError) as error:
        console.print(f"[red]the demo failed:[/] {error}", highlight=False)
        return 1
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM is as Ctrl-C."""
    raise KeyboardInterrupt


def run_demo(out: Path, corpus: str, recipe: Path, model: Path, console: Console) -> dict[str, Any]:
    """The whole demo; the report that it wrote to `out/report.json`."""
    started = time.monotonic()
    _make_anew(out)
    data = out / "coordinator"
    with Processes(out / "logs") as processes:
        console.rule("1. a coordinator")
        processes.run("init", ["cbtm-coord", "init", "--data-dir", str(data)])
        serve = ["cbtm-coord", "serve", "--data-dir", str(data), "--host", "127.0.0.1", "--port", "0"]
        processes.start("coordinator", [*serve, "--http-port", "0"])
        join = processes.wait_for_line("coordinator", "cbtm-worker join")
        console.print(f"volunteers join with: [bold]{join}[/]", highlight=False)

        console.rule(f"2. a run: {CLUSTERS} clusters, a seed from scratch, a dense baseline beside it")
        create = ["cbtm-coord", "run", "create", "--data-dir", str(data), "--name", RUN, "--corpus", corpus]
        create += ["--clusters", str(CLUSTERS), "--from-scratch", str(model), "--recipe", str(recipe)]
        processes.run("run create", [*create, "--id-field", "id", "--baseline"])

        console.rule(f"3. {WORKERS} workers")
        for number in range(WORKERS):
            extra = ["--cache-dir", str(out / f"worker-{number}"), "--name", f"worker-{number}", "--until-idle"]
            processes.start(f"worker-{number}", [*shlex.split(join), *extra, "--threads", "1"])
        target = (data / "coordinator.address").read_text("utf-8").strip()
        token = (data / "admin.token").read_text("utf-8").strip()
        with connect(target, token=token) as connection:
            _watch(connection, processes, console)
        trained = time.monotonic() - started

        console.rule("4. what came of it")
        report = _evaluate(target, token, out, console)
    report["seconds"] = round(time.monotonic() - started, 1)
    report["seconds_until_trained"] = round(trained, 1)
    report["machine"] = {"platform": platform.platform(), "python": platform.python_version()}
    report["versions"] = {name: version(name) for name in ("cbtm", "torch", "transformers")}
    (out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
    show(console, report)
    _what_next(console, out, report["seconds"])
    return report


def _make_anew(out: Path) -> None:
    """An empty result folder. Raises ProcessFailed rather than delete what the demo did not make."""
    if out.exists():
        workers = {f"worker-{number}" for number in range(WORKERS)}
        known = {"client", "coordinator", "ensemble", "logs", "report.json"} | workers
        strange = sorted(path.name for path in out.iterdir() if path.name not in known)
        if strange:
            raise ProcessFailed(f"{out} is no result of the demo (it holds {strange[0]}); --out takes another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True)


def _watch(connection: Connection, processes: Processes, console: Console) -> None:
    """Shows both runs until they are complete."""
    from cbtm_coordinator.cli.status import render_run, run_facts

    wait = threading.Event()
    last = ""
    with Live(Text(""), console=console, auto_refresh=False, transient=True) as live:
        while True:
            processes.check()
            facts = [run_facts(connection, name) for name in (RUN, BASELINE)]
            live.update(Group(*(render_run(f) for f in facts)), refresh=True)
            # Elsewhere than on a terminal, a line every five percent.
            line = "  ".join(f"{f['run']}: {f['state']} {5 * int(20 * f['trained_share'])} %" for f in facts)
            if not console.is_terminal and line != last:
                console.print(line, highlight=False)
                last = line
            if all(f["state"] == "COMPLETE" for f in facts):
                break
            if any(f["state"] == "FAILED" for f in facts):
                raise ProcessFailed("; ".join(f"{f['run']}: {f['reason']}" for f in facts if f["reason"]))
            if not any(processes.is_running(f"worker-{n}") for n in range(WORKERS)):
                tails = "\n".join(f"worker-{n}:\n{processes.tail(f'worker-{n}')}" for n in range(WORKERS))
                raise ProcessFailed(f"the workers left before the end\n{tails}")
            wait.wait(_POLL_SECONDS)
    for f in facts:
        console.print(render_run(f))


def _evaluate(target: str, token: str, out: Path, console: Console) -> dict[str, Any]:
    import torch

    import cbtm

    torch.set_num_threads(WORKERS)
    cache = out / "client"
    with Progress(*Progress.get_default_columns(), console=console) as bars:
        bar_of: dict[str, TaskID] = {}

        def progress(name: str, done: int, total: int) -> None:
            if name not in bar_of:
                bar_of[name] = bars.add_task(f"scoring with {name}", total=total)
            bars.update(bar_of[name], completed=done)

        found = cbtm.evaluate_run(
            target,
            run=RUN,
            token=token,
            baseline=BASELINE,
            cache_dir=cache,
            max_tokens_per_cluster=MAX_TOKENS,
            progress=progress,
        ).to_dict()
    with cbtm.Ensemble.from_coordinator(target, run=RUN, token=token, top_k=2, cache_dir=cache) as model:
        routings = [
            {"text": text, "weights": [{"cluster": w.index, "weight": w.weight} for w in model.route(text).weights]}
            for text in SENTENCES
        ]
        sample = model.generate(PROMPT, max_new_tokens=60, temperature=0.8, seed=0)
        model.save(out / "ensemble")
    return {
        "perplexity": found["perplexity"],
        "clusters": found["clusters"],
        "evaluation": {k: v for k, v in found.items() if k not in ("perplexity", "clusters")},
        "routing": routings,
        "sample": {"prompt": PROMPT, "text": sample.completion},
    }


def _what_next(console: Console, out: Path, seconds: float) -> None:
    console.print(f"\nAll of it took {human_seconds(seconds)}; {out}/report.json has the numbers. Try next:")
    console.print(f"  cbtm generate 'It was a' --ensemble {out}/ensemble   # the ensemble, without a coordinator")
    console.print(f"  cbtm route 'let mut x = 3;' --ensemble {out}/ensemble # which experts a text goes to")
    console.print(f"  cbtm-coord serve --data-dir {out}/coordinator         # the coordinator again; then, beside it:")
    console.print(f"  cbtm-coord cluster show 0 --run {RUN} --data-dir {out}/coordinator")


if __name__ == "__main__":
    sys.exit(main())
