"""What is trained: sizes, and the contenders of one seed, as plain values.

Every contender sees `Size.tokens` training tokens, the seed phase's included.

- Protocol A is the paper's (arXiv 2303.14177): dense and seed at batch B, experts at batch B/K, so that all take equal
  steps; half of the tokens in the seed phase.
- Protocol B is the honest one: the dense batch is swept, then its learning rate, and the best by validation counts; the
  seed trains as that one does, and the experts go on with a small batch, at a rate chosen by validation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cbtm_common.recipe import (
    LeaseRecipe,
    OptimizerRecipe,
    Precision,
    Recipe,
    RouterKind,
    RoutingRecipe,
    ScheduleRecipe,
    SeedRecipe,
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """`model` is a config for `--from-scratch`; `domain_bytes` is how much of each domain's text is taken."""

    name: str
    model: Mapping[str, Any]
    sequence_length: int
    tokens: int
    domain_bytes: int
    held_out_fraction: float
    # Held-out documents to choose by, and to report on, at most; of each so many tokens from its beginning.
    documents: tuple[int, int]
    document_tokens: int
    learning_rates: tuple[float, ...]
    dense_batches: tuple[int, ...]
    paper_batch: int
    expert_batch: int
    # Protocol B's experts are tried at these multiples of the seed's rate, scaled to their batch; the first at every K
    # unless another is better at the greatest.
    expert_rates: tuple[float, ...]
    # Of protocol B's experts, whose optimizer begins without a memory.
    expert_warmup_steps: int
    clusters: tuple[int, ...]
    random_clusters: int
    warmup_steps: int
    precision: Precision = Precision.FP32
    workers: int = 2
    threads: int = 1
    device: str = "cpu"


def _llama(*, vocab: int, hidden: int, layers: int, heads: int, context: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": -(-hidden * 8 // 3 // 8) * 8,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
    }


SIZES = {
    # Shows in minutes that every part works; its numbers say nothing.
    "tiny": Size(
        name="tiny",
        model=_llama(vocab=512, hidden=32, layers=2, heads=2, context=64),
        sequence_length=64,
        tokens=65_536,
        domain_bytes=40_000,
        held_out_fraction=0.1,
        documents=(100, 250),
        document_tokens=96,
        learning_rates=(3e-3, 6e-3),
        dense_batches=(4, 8, 16),
        paper_batch=8,
        expert_batch=2,
        expert_rates=(1.0, 2.0),
        expert_warmup_steps=20,
        clusters=(2, 4),
        random_clusters=2,
        warmup_steps=5,
    ),
    # Under an hour of two CPU cores. Two layers and short sequences, as these leave the first plateau soonest: after a
    # million tokens perplexity was 156 in sequences of 128, for the same model with four layers 158, with sequences of
    # 256 194.
    "small": Size(
        name="small",
        model=_llama(vocab=2048, hidden=128, layers=2, heads=4, context=128),
        sequence_length=128,
        tokens=6_000_000,
        domain_bytes=1_000_000,
        held_out_fraction=0.06,
        documents=(100, 250),
        document_tokens=384,
        learning_rates=(3e-3, 1.5e-3, 6e-3),
        dense_batches=(8, 16, 32),
        paper_batch=32,
        expert_batch=4,
        expert_rates=(1.0, 2.0),
        expert_warmup_steps=20,
        clusters=(4, 8, 16),
        random_clusters=8,
        warmup_steps=50,
    ),
    # For a GPU: 124 M parameters.
    "124m": Size(
        name="124m",
        model=_llama(vocab=32_000, hidden=768, layers=12, heads=12, context=1024),
        sequence_length=1024,
        tokens=400_000_000,
        domain_bytes=1 << 40,
        held_out_fraction=0.02,
        documents=(500, 2000),
        document_tokens=1024,
        learning_rates=(6e-4, 1.2e-3),
        dense_batches=(32, 64, 128),
        paper_batch=256,
        expert_batch=16,
        expert_rates=(1.0, 2.0),
        expert_warmup_steps=20,
        clusters=(4, 8, 16),
        random_clusters=8,
        warmup_steps=200,
        precision=Precision.BF16,
        workers=1,
        threads=8,
        device="cuda",
    ),
}


# Shares of the tokens that protocol B's seeds take; at the first every K is trained, at the others the greatest.
FRACTIONS = (0.75, 0.5)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One cut of the grid. `full` sweeps every dense batch at every rate, and trains every K after every seed."""

    size: Size
    seeds: tuple[int, ...]
    full: bool

    @property
    def clusters(self) -> tuple[int, ...]:
        """Values of K; the greatest is last."""
        return (*self.size.clusters, 25) if self.full else self.size.clusters

    def honest_clusters(self, fraction: float) -> tuple[int, ...]:
        """Values of K of protocol B at this seed fraction, the greatest first."""
        most = self.clusters[-1]
        others = self.clusters[:-1] if self.full or fraction == FRACTIONS[0] else ()
        return (most, *others)

    def units(self) -> float:
        """Training tokens of all of it, as multiples of `size.tokens`; what a sweep's edge may add is not in it."""
        size, first_rate_only = self.size, not self.full
        sweep = len({*size.dense_batches, size.paper_batch})
        dense = sweep + len(size.learning_rates) - 1 if first_rate_only else sweep * len(size.learning_rates)
        paper = 0.5 + 0.5 * len(self.clusters) + 0.5
        honest = 0.0
        for fraction in FRACTIONS:
            runs = len(self.honest_clusters(fraction)) + len(size.expert_rates) - 1
            honest += fraction + (1 - fraction) * runs
        return len(self.seeds) * (dense + paper + honest)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """How the seed or the experts step."""

    batch: int
    learning_rate: float
    warmup_steps: int = 0


def recipe(size: Size, *, seed: int, clusters: int, fraction: float, seed_phase: Phase, experts: Phase) -> Recipe:
    """Of a run whose experts train (1 - fraction) of the tokens together, after a seed phase."""
    expert_tokens = size.tokens * (1 - fraction) / clusters
    return Recipe(
        sequence_length=size.sequence_length,
        global_batch=experts.batch,
        steps=max(1, round(expert_tokens / (experts.batch * size.sequence_length))),
        seed=seed,
        precision=size.precision,
        held_out_fraction=size.held_out_fraction,
        optimizer=OptimizerRecipe(learning_rate=experts.learning_rate),
        schedule=ScheduleRecipe(warmup_steps=experts.warmup_steps),
        seed_phase=SeedRecipe(
            fraction=fraction,
            global_batch=seed_phase.batch,
            learning_rate=seed_phase.learning_rate,
            warmup_steps=seed_phase.warmup_steps,
        ),
        routing=RoutingRecipe(router=RouterKind.LEARNED),
        lease=LeaseRecipe(lease_seconds=60, renew_seconds=5, checkpoint_seconds=120),
    )


def toml(recipe: Recipe) -> str:
    """The recipe as `cbtm-coord run create --recipe` reads it."""
    fields = recipe.model_dump(mode="json", exclude_none=True)
    tables = {name: value for name, value in fields.items() if isinstance(value, dict)}
    lines = [_line(name, value) for name, value in fields.items() if name not in tables]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(_line(key, value) for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _line(name: str, value: str | int | float) -> str:
    return f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value!r}"
