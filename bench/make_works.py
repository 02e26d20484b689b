"""Experts trained honestly and not, each measured as evaluators and auditors measure it.

    python -m bench.make_works [--out FILE]

`bench.verification` draws its community's work from what this wrote, so nothing there is invented. The example corpus
is clustered, tokenized and sharded by the product's own code; a seed of 0.2 M parameters is trained on all of it, and
experts on each cluster, in `ORDERS` orders of data. Kept of each work, for N sequences of its own held-out text, of
its training text and of other clusters' text: the loss of the seed and of what was handed in, in float32 and under
bf16 autocast; the loss that its worker saw last; and how far replays of two of its segments come out, as a share of the
distance that the weights moved.

One core, and about five minutes of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.works import FILE, PRECISIONS, Kind, Losses, Work, load, save
from cbtm_common.ids import cluster_id
from cbtm_common.recipe import OptimizerRecipe, Precision, Recipe
from cbtm_common.shards import read_shard
from cbtm_coordinator.clustering.corpus import Document, ReadReport, open_corpus
from cbtm_coordinator.clustering.fit import fit
from cbtm_coordinator.clustering.seed_model import from_scratch
from cbtm_coordinator.clustering.sharding import TRAIN, shard_corpus
from cbtm_coordinator.clustering.tokenizer import train_tokenizer
from cbtm_worker.train import Snapshot, Trainer, TrainJob, write_checkpoint
from cbtm_worker.train.model import load_model

CORPUS = Path(__file__).parent.parent / "examples" / "corpus"
MODEL = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
CLUSTERS, ORDERS = 8, 1
SEED_STEPS, STEPS = 600, 80
SEGMENT = 10
# Segments that are replayed: the first, and one in the middle.
REPLAYED = (0, 4)
FEW_STEPS = STEPS // 20
SEQUENCES = 96
CANARY_CLUSTERS = 4

Weights = Mapping[str, torch.Tensor]


# Training


@dataclass(kw_only=True)
class Chain:
    """What a worker committed: weights at the ends of segments, by the step that it claims, and the last loss."""

    recipe: Recipe
    job: TrainJob
    weights: dict[int, Weights] = field(default_factory=dict)
    folders: dict[int, Path] = field(default_factory=dict)
    loss: float = math.nan


def _ends() -> set[int]:
    return {SEGMENT * s for s in REPLAYED} | {SEGMENT * (s + 1) for s in REPLAYED} | {STEPS}


def train(job: TrainJob, folder: Path, *, honest: Recipe, ratio: int = 1, stop: int = STEPS) -> Chain:
    """Trains `job`; each of its steps is passed off as `ratio` of them. After `stop` steps nothing moves any more."""
    chain = Chain(recipe=honest, job=job)
    with Trainer(job) as trainer:
        for claimed in sorted(_ends()):
            while trainer.step < min(claimed // ratio, stop, trainer.total_steps):
                chain.loss = trainer.train_step().loss
            snapshot = trainer.snapshot()
            chain.weights[claimed] = snapshot.weights
            if claimed not in (0, STEPS):
                chain.folders[claimed] = folder / str(claimed)
                write_checkpoint(_claiming(snapshot, honest, claimed), chain.folders[claimed], final=False)
    return chain


def _claiming(snapshot: Snapshot, honest: Recipe, step: int) -> Snapshot:
    state = replace(snapshot.state, step=step, total_steps=STEPS, recipe_sha256=honest.training_sha256())
    return replace(snapshot, state=state)


def replays(chain: Chain, job: TrainJob, how: str = "same") -> list[float]:
    """Deviation of an honest replay of each segment in `REPLAYED`, from what `chain` has at its beginning."""
    context: Callable[[], Any] = contextlib.nullcontext
    if how == "micro-batch":
        job = replace(job, micro_batch=1)
    elif how == "bf16":
        context = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    found = []
    for segment in REPLAYED:
        begin, end = SEGMENT * segment, SEGMENT * (segment + 1)
        with Trainer(replace(job, resume_dir=chain.folders.get(begin))) as trainer:
            while trainer.step < end:
                with context():
                    trainer.train_step()
            found.append(deviation(trainer.snapshot().weights, chain.weights[end], chain.weights[begin]))
    return found


def deviation(replayed: Weights, committed: Weights, base: Weights) -> float:
    """|w' - w| / |w - w0| over all weights; infinite where nothing moved and the replay did."""
    apart = math.sqrt(sum(float((replayed[n] - w).double().square().sum()) for n, w in committed.items()))
    moved = math.sqrt(sum(float((base[n] - w).double().square().sum()) for n, w in committed.items()))
    return apart / moved if moved else math.inf


def noisy(base: Weights, honest: Weights, share: float, seed: int) -> dict[str, torch.Tensor]:
    """`base` moved at random, each tensor by `share` of how far `honest` moved it."""
    draw = torch.Generator().manual_seed(seed)
    moved = {}
    for name, weight in base.items():
        noise = torch.randn(weight.shape, generator=draw)
        moved[name] = weight + noise * (share * (honest[name] - weight).norm() / noise.norm())
    return moved


# Measuring


class Scorer:
    """Losses of weights on windows [N, L + 1], sequence by sequence."""

    def __init__(self, model_dir: Path, length: int) -> None:
        self._model, _ = load_model(model_dir, dropout=None, sequence_length=length)
        self._model.train(False)

    def __call__(self, weights: Weights, windows: Mapping[str, npt.NDArray[np.int64]]) -> dict[str, dict[str, Losses]]:
        self._model.load_state_dict(dict(weights))
        return {
            name: {precision: self._losses(found, precision == "bf16") for precision in PRECISIONS}
            for name, found in windows.items()
        }

    @torch.inference_mode()
    def _losses(self, windows: npt.NDArray[np.int64], half: bool) -> Losses:
        tokens = torch.from_numpy(windows)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            logits = self._model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        return np.asarray(losses.mean(dim=1), dtype=np.float32)


def windows_of(paths: list[Path], length: int, count: int, draw: np.random.Generator) -> npt.NDArray[np.int64]:
    """`count` sequences at random, [count, length + 1]."""
    found = []
    for path in paths:
        tokens = read_shard(path).tokens
        found += [tokens[start : start + length + 1] for start in range(0, len(tokens) - length, length)]
    return np.stack([found[i] for i in draw.permutation(len(found))[:count]]).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Shards by cluster."""

    train: list[list[Path]]
    held_out: list[list[Path]]

    def windows(self, cluster: int, length: int) -> dict[str, npt.NDArray[np.int64]]:
        draw = np.random.default_rng(cluster)
        others = draw.permutation([c for c in range(CLUSTERS) if c != cluster])[:CANARY_CLUSTERS]
        share = SEQUENCES // CANARY_CLUSTERS
        return {
            "own": windows_of(self.held_out[cluster], length, SEQUENCES, draw),
            "train": windows_of(self.train[cluster], length, SEQUENCES, draw),
            "canary": np.concatenate([windows_of(self.train[c], length, share, draw) for c in others]),
        }


def prepare(folder: Path) -> tuple[Corpus, Path]:
    """The corpus in shards, and a model with random weights."""
    corpus = open_corpus([str(CORPUS / "*.jsonl.gz")])
    documents: list[Document] = list(corpus.documents(ReadReport()))
    tokenizer = train_tokenizer(
        (d.text for d in documents), folder / "tokenizer", vocab_size=int(str(MODEL["vocab_size"])), context=128
    )
    fitted = fit([d.text for d in documents], [cluster_id("works", c) for c in range(CLUSTERS)], seed=0)
    output = folder / "shards"
    shards, _ = shard_corpus([lambda: iter(documents)], fitted.router, tokenizer, output, held_out_fraction=0.1)
    split: dict[bool, list[list[Path]]] = {is_train: [[] for _ in range(CLUSTERS)] for is_train in (True, False)}
    for shard in shards:
        split[shard.split == TRAIN][shard.cluster_index].append(output / shard.path)
    config = folder / "model.json"
    config.write_text(json.dumps(MODEL), "utf-8")
    from_scratch(config, folder / "random", seed=0, vocab_size=len(tokenizer), eos_token_id=int(tokenizer.eos_token_id))
    return Corpus(train=split[True], held_out=split[False]), folder / "random"


def works(folder: Path, say: Callable[[str], None]) -> list[Work]:
    corpus, random_model = prepare(folder)
    recipe = Recipe(
        sequence_length=128,
        global_batch=8,
        steps=STEPS,
        precision=Precision.FP32,
        dropout=0.0,
        optimizer=OptimizerRecipe(learning_rate=3e-3),
    )
    seed = TrainJob(
        recipe=recipe,
        task_id="seed",
        kind="seed",
        total_steps=SEED_STEPS,
        model_dir=random_model,
        shard_paths=[path for paths in corpus.train for path in paths],
        data_key="works",
    )
    with Trainer(seed) as trainer:
        while trainer.step < SEED_STEPS:
            result = trainer.train_step()
        write_checkpoint(trainer.snapshot(final=True), folder / "seed", final=True)
        base = trainer.snapshot().weights
    say(f"seed: loss {result.loss:.3f}")
    score = Scorer(folder / "seed" / "model", recipe.sequence_length)
    found = []
    for cluster in range(CLUSTERS):
        windows = corpus.windows(cluster, recipe.sequence_length)
        base_losses = score(base, windows)
        for order in range(ORDERS):
            job = TrainJob(
                recipe=recipe.model_copy(update={"seed": order}),
                task_id=f"expert-{cluster}",
                kind="expert",
                total_steps=STEPS,
                model_dir=folder / "seed" / "model",
                shard_paths=corpus.train[cluster],
                data_key=cluster_id("works", cluster),
            )
            for kind, chain in _chains(job, corpus, cluster, base, folder / f"{cluster}-{order}").items():
                hows = ("same", "micro-batch", "bf16") if kind is Kind.HONEST else ("same",)
                moves = any(not torch.equal(base[n], w) for n, w in chain.weights[SEGMENT].items())
                work = Work(
                    kind=kind,
                    cluster=cluster,
                    order=order,
                    loss=chain.loss,
                    base_losses=base_losses,
                    losses=score(chain.weights[STEPS], windows),
                    deviations={how: replays(chain, job, how) if moves else [math.inf] for how in hows},
                )
                found.append(work)
                gain = float((base_losses["own"]["fp32"] - work.losses["own"]["fp32"]).mean())
                say(f"cluster {cluster}, {kind}: gain {gain:+.4f}, replays {work.deviations}")
    return found


def _chains(job: TrainJob, corpus: Corpus, cluster: int, base: Weights, folder: Path) -> dict[Kind, Chain]:
    honest = job.recipe
    half = honest.model_copy(update={"steps": STEPS // 2})
    chains = {
        Kind.HONEST: train(job, folder / "honest", honest=honest),
        Kind.OTHER_DATA: train(
            replace(job, shard_paths=corpus.train[(cluster + 1) % CLUSTERS]), folder / "other", honest=honest
        ),
        Kind.FEW_STEPS: train(job, folder / "few", honest=honest, stop=FEW_STEPS),
        Kind.HALF_STEPS: train(
            replace(job, recipe=half, total_steps=STEPS // 2), folder / "half", honest=honest, ratio=2
        ),
    }
    trained = chains[Kind.HONEST]
    # Moments of an optimizer that the noise did not come from: whoever hands in noise has none of its own.
    noise = replace(trained, folders=dict(trained.folders), weights=_noise_chain(base, trained, cluster))
    for step, path in list(noise.folders.items()):
        noise.folders[step] = _with_weights(path, noise.weights[step], folder / "noise" / str(step))
    chains[Kind.NOISE] = noise
    chains[Kind.SEED_RETURNED] = replace(trained, weights=dict.fromkeys(trained.weights, base))
    return chains


def _noise_chain(base: Weights, trained: Chain, seed: int) -> dict[int, Weights]:
    return {step: noisy(base, trained.weights[STEPS], step / STEPS, seed) for step in trained.weights}


def _with_weights(checkpoint: Path, weights: Weights, folder: Path) -> Path:
    """The checkpoint with other weights."""
    shutil.copytree(checkpoint, folder)
    (path,) = (folder / "model").glob("*.safetensors")
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    save_file({name: weights[name].contiguous() for name in names}, path, metadata={"format": "pt"})
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        save(works(Path(name), partial(print, flush=True)), options.out)
    print(f"{len(load(options.out))} works in {options.out}")


if __name__ == "__main__":
    main()
