"""The ensemble against one dense model of an expert's size: tokens/s of generation and scoring, and peak memory.

    python -m bench.generate [--quick]

Both sides run in turn in the same process on the same texts: `transformers.generate` on one expert, and the same call
on `CbtmForCausalLM`. The experts are copies of one random model, as time does not depend on weights, so the outputs
must be the same tokens, which is checked. Texts are the example corpus, its continuation forced token by token, so that
routing sees real text grow. The router is fitted on that corpus, with 16 clusters; weights are routed anew at each
token. Batches of 8 are of two kinds, for on a CPU a step costs the reading of weights, so what counts is how many
different experts the rows of a batch need (also shown): 8 continuations of one prompt, to which the bars apply, and 8
documents of as many clusters, for which no arrangement can keep up with one model that serves them all.

Scoring likewise, of 16 documents: of one cluster, as held-out documents of a domain are scored, to which the bars
apply, and (not with --quick) of as many clusters, where each expert reads a document or two by itself. Routed once, on
the first tokens, as in few-shot evaluation, each token is read by k experts. Routed at each token, an expert must read
a document up to the last token that it is used for, and documents use many early on: the reading that takes is shown
beside the speed, and the speed against as much reading by one expert.

Peak memory is that of a process that generates with the top 2 of 16 experts, every one of which is used, under a budget
of 4: resident memory beyond what it had before the first expert, in units of 4 experts' weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bench.report import Report
from cbtm_common.ids import cluster_id
from cbtm_common.recipe import Recipe, RoutingRecipe
from cbtm_coordinator.clustering.corpus import ReadReport, open_corpus
from cbtm_coordinator.clustering.fit import fit
from cbtm_coordinator.clustering.tokenizer import train_tokenizer

CORPUS = Path(__file__).parent.parent / "examples" / "corpus"
CLUSTERS = 16
BUDGET = 4
VOCABULARY = 4096
CONTEXT = 512
BARS = {1: 0.9, 2: 0.45, 4: 0.22}


def build(root: Path, *, hidden: int, layers: int, documents: int) -> tuple[Path, list[str]]:
    """A saved ensemble under `root`, and so many documents of the corpus, on which its router is fitted."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from cbtm._ensemble import Ensemble
    from cbtm._folder import FolderSource
    from cbtm._parts import ClusterInfo, EnsembleParts
    from cbtm._residency import Placement

    corpus = open_corpus([str(CORPUS / "*.jsonl.gz")])
    texts = [document.text for document in corpus.documents(ReadReport())]
    texts = texts[:: max(1, len(texts) // documents)]
    tokenizer = train_tokenizer(texts[:400], root / "tokenizer", vocab_size=VOCABULARY, context=CONTEXT)
    ids = [cluster_id("run", index) for index in range(CLUSTERS)]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=CONTEXT,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.save_pretrained(root / "expert")
    parts = EnsembleParts(
        run_id="run",
        run_name="bench",
        router=fit(texts, ids, seed=0, temperature=0.1).router,
        tokenizer_dir=root / "tokenizer",
        clusters=tuple(ClusterInfo(id=c, index=i) for i, c in enumerate(ids)),
        experts={c: FolderSource(name=c, root=root, relative="expert", digests={}) for c in ids},
        recipe=Recipe(sequence_length=CONTEXT, routing=RoutingRecipe(temperature=0.1, top_k=2)),
    )
    Ensemble._of(parts, Placement(), top_k=None, temperature=None).save(root / "ensemble")
    shutil.rmtree(root / "expert")
    # Hashing files on first use is not what is measured.
    manifest = root / "ensemble" / "cbtm.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text("utf-8")), "files": {}}), "utf-8")
    return root / "ensemble", texts


class Forced:
    """A logits processor: every row goes on as `truth` says, whatever the model thinks."""

    def __init__(self, truth_BT: Any, start: int) -> None:
        self._truth_BT = truth_BT
        self._start = start

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        chosen_B = self._truth_BT[:, input_ids.shape[1] - self._start]
        scores[range(len(chosen_B)), chosen_B] = float("inf")
        return scores


def fastest(rounds: int, runs: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Seconds of each, the best of so many rounds in turn, after one that is not counted."""
    best = dict.fromkeys(runs, float("inf"))
    for n in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if n:
                best[name] = min(best[name], time.perf_counter() - started)
    return best


def by_cluster(model: Any, texts: list[str], tokens: int) -> list[list[int]]:
    """The start of a document of each cluster in turn, as token ids."""
    found: dict[int, list[int]] = {}
    for text, cluster in zip(texts, model.parts.router.assign(texts).tolist(), strict=True):
        if cluster not in found:
            ids = model.encode(text)[:tokens]
            if len(ids) == tokens:
                found[cluster] = ids
    return [found[cluster] for cluster in sorted(found)]


def of_one_cluster(model: Any, texts: list[str], tokens: int) -> list[list[int]]:
    """The starts of up to 16 documents of the cluster that has most of them."""
    found: dict[int, list[list[int]]] = {}
    for text, cluster in zip(texts, model.parts.router.assign(texts).tolist(), strict=True):
        ids = model.encode(text)[:tokens]
        if len(ids) == tokens:
            found.setdefault(cluster, []).append(ids)
    return max(found.values(), key=len)[:16]


def generation(report: Report, folder: Path, texts: list[str], *, prompt: int, new: int, rounds: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LogitsProcessorList

    from cbtm import CbtmForCausalLM, Ensemble

    dense = AutoModelForCausalLM.from_pretrained(folder / "experts/0000")
    model = Ensemble.load(folder)
    models = {k: CbtmForCausalLM.from_ensemble(model.with_routing(top_k=k)) for k in BARS}
    documents = by_cluster(model, texts, prompt + new)
    one = documents[len(documents) // 2]
    # The last is slow, and without a bar.
    few = [ids[: prompt + new // 3] for ids in documents[:8]]
    batches = {"batch 1": [one], "batch 8, one prompt": [one] * 8, "batch 8, eight clusters": few}
    for label, rows in batches.items():
        ids_BT = torch.tensor(rows)
        added = ids_BT.shape[1] - prompt
        options: dict[str, Any] = {
            "attention_mask": torch.ones_like(ids_BT[:, :prompt]),
            "max_new_tokens": added,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
            "logits_processor": LogitsProcessorList([Forced(ids_BT[:, prompt:], prompt)]),
        }

        def run(what: Any, ids_BT: Any = ids_BT, options: Any = options) -> None:
            assert torch.equal(what.generate(ids_BT[:, :prompt], **options), ids_BT)

        runs: dict[str, Callable[[], Any]] = {"dense": partial(run, dense)}
        for k, ensemble in models.items():
            runs[f"top-{k}"] = partial(run, ensemble)
        seconds = fastest(rounds if "clusters" in label else 2 * rounds, runs)
        report.add(f"{label}: one expert alone", len(rows) * added / seconds["dense"], "tokens/s")
        for k, bar in BARS.items():
            ratio = seconds["dense"] / seconds[f"top-{k}"]
            report.add(f"{label}: top-{k} against it", ratio, "x", bar=None if "clusters" in label else bar)
            if "clusters" in label:
                router = models[k].ensemble.context_router
                used = np.stack([router.positions(row, prompt) for row in rows]).any(axis=0).sum(axis=1).mean()
                report.add(f"{label}: top-{k}, experts a step", float(used), "")


def scoring(
    report: Report, folder: Path, texts: list[str], *, prompt: int, tokens: int, rounds: int, quick: bool
) -> None:
    from cbtm import Ensemble
    from cbtm._scoring import TokenSequence, mixture_scores, model_scores

    model = Ensemble.load(folder)
    window: Any = {"window": CONTEXT, "stride": CONTEXT // 2}
    dense = model.pool.get(0)
    length = prompt + tokens
    kinds = {"one cluster": of_one_cluster(model, texts, length)}
    if not quick:
        kinds["sixteen"] = by_cluster(model, texts, length)
    for kind, documents in kinds.items():
        sequences = [TokenSequence(ids=model.sequence_of(ids).ids, first=prompt + 1) for ids in documents]
        runs: dict[str, Callable[[], Any]] = {"dense": partial(model_scores, dense, sequences, **window)}
        reads: dict[str, float] = {}
        for k in BARS:
            for policy in ("prompt", "prefix"):
                router = model.with_routing(top_k=k, policy=policy).context_router
                runs[f"{policy} {k}"] = partial(mixture_scores, model.pool, router, sequences, **window)
                reads[f"{policy} {k}"] = reads_per_token([router.positions(s.ids, s.first) for s in sequences], prompt)
        seconds = fastest(rounds, runs)
        name = f"scoring, {kind}"
        report.add(f"{name}: one expert alone", len(sequences) * tokens / seconds["dense"], "tokens/s")
        for k, bar in BARS.items():
            ratio = seconds["dense"] / seconds[f"prompt {k}"]
            report.add(f"{name}, routed once: top-{k}", ratio, "x", bar=bar if kind == "one cluster" else None)
        for k in BARS:
            ratio, read = seconds["dense"] / seconds[f"prefix {k}"], reads[f"prefix {k}"]
            report.add(f"{name}, at each token: top-{k}", ratio, "x")
            report.add("the same: tokens read for each", read, "")
            report.add("the same: speed against reading as many alone", ratio * read, "x")


def reads_per_token(weights: list[Any], prompt: int) -> float:
    """Tokens that experts must read, by tokens of text: each reads up to the last token that it is used for."""
    used = [np.flatnonzero(weights_TK[:, j]) for weights_TK in weights for j in range(weights_TK.shape[1])]
    read = sum(prompt + int(places[-1]) + 1 for places in used if len(places))
    return read / sum(prompt + len(weights_TK) for weights_TK in weights)


def peak_memory(folder: Path, texts_path: Path, *, prompt: int, new: int) -> dict[str, Any]:
    """In a process of its own: bytes beyond those before the first expert, and which experts were used."""
    import torch

    from cbtm import CbtmForCausalLM

    model = CbtmForCausalLM.from_pretrained(folder, max_experts=BUDGET, num_experts_per_tok=2)
    texts = json.loads(texts_path.read_text("utf-8"))
    documents = by_cluster(model.ensemble, texts, prompt)
    # What torch and transformers take for themselves at the first forward pass is not weights.
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1
    )
    AutoModelForCausalLM.from_config(config).generate(  # type: ignore[no-untyped-call]
        torch.ones((1, 4), dtype=torch.long), max_new_tokens=2, eos_token_id=None, pad_token_id=0
    )
    before = _status("VmRSS")
    for ids in documents:
        model.generate(torch.tensor([ids]), max_new_tokens=new, eos_token_id=None, pad_token_id=0)
    weights = sum(p.numel() * p.element_size() for p in model.ensemble.pool.get(0).parameters())
    return {"bytes": _status("VmHWM") - before, "weights": weights, "loads": model.ensemble.pool.loads}


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer rounds, under 60 s")
    parser.add_argument("--memory", nargs=2, type=Path, metavar=("FOLDER", "TEXTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.memory:
        print(json.dumps(peak_memory(*options.memory, prompt=32, new=8)))
        return
    report = Report(bench="generate")
    rounds = 1 if options.quick else 2
    with TemporaryDirectory() as scratch:
        size = (
            {"hidden": 384, "layers": 4, "documents": 200}
            if options.quick
            else {"hidden": 640, "layers": 8, "documents": 2000}
        )
        folder, texts = build(Path(scratch), **size)
        generation(report, folder, texts, prompt=32, new=24 if options.quick else 64, rounds=rounds)
        scoring(
            report, folder, texts, prompt=32, tokens=48 if options.quick else 368, rounds=rounds, quick=options.quick
        )
        (Path(scratch) / "texts.json").write_text(json.dumps(texts), "utf-8")
        command = [sys.executable, "-m", "bench.generate", "--memory", str(folder), str(Path(scratch) / "texts.json")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        memory = json.loads(done.stdout.splitlines()[-1])
    report.add(
        "peak memory, top-2 of 16 under a budget of 4",
        memory["bytes"] / (BUDGET * memory["weights"]),
        "x",
        bar=1.15,
        sense="at most",
    )
    report.add("the same: loads of an expert", memory["loads"], "")
    report.finish()


if __name__ == "__main__":
    main()
