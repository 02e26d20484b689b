"""Trains the contenders of one seed, in an order that keeps every worker busy. What is trained already is not again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.reproduce.corpus import parts
from bench.reproduce.grid import FRACTIONS, Phase, Plan, recipe
from bench.reproduce.site import Site
from cbtm_common.recipe import Recipe

# (dense run, the run beside which it stands) -> its validation perplexity, when complete.
Validate = Callable[[str, str], float]


@dataclass(frozen=True, kw_only=True)
class Dense:
    run: str
    batch: int
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A run of K experts, or K runs of one expert each, at random."""

    runs: tuple[str, ...]
    protocol: str
    clusters: int
    fraction: float
    random: bool = False
    learning_rate: float = 0.0

    @property
    def run(self) -> str:
        return self.runs[0]


@dataclass(kw_only=True)
class Trained:
    """Names of runs. `host` is the one whose held-out documents are everybody's; `paper_dense` is protocol A's."""

    host: str
    dense: list[Dense] = field(default_factory=list)
    experts: list[Experts] = field(default_factory=list)
    # Protocol B's at the greatest K, by the rate of their experts; the best of each fraction is among `experts` too.
    tried: list[Experts] = field(default_factory=list)
    paper_dense: str = ""
    best_dense: str = ""


def train(
    site: Site,
    plan: Plan,
    corpus: Path,
    *,
    seed: int,
    validate: Validate,
    validate_experts: Callable[[Experts, str], float],
    seed_of: Callable[[str], Path],
    tokenizer_of: Callable[[str], Path],
) -> Trained:
    """All of one seed.

    `validate` scores a complete dense run, `validate_experts` a run's top-1; `seed_of` and `tokenizer_of` give a run's
    folders.
    """
    size = plan.size
    config = site.cache.parent / "model.json"
    config.write_text(json.dumps(dict(size.model), indent=1) + "\n", "utf-8")
    first_rate = size.learning_rates[0]

    def name(kind: str) -> str:
        return f"s{seed}-{kind}"

    def paper(clusters: int) -> Recipe:
        return recipe(
            size,
            seed=seed,
            clusters=clusters,
            fraction=0.5,
            seed_phase=Phase(batch=size.paper_batch, learning_rate=first_rate, warmup_steps=size.warmup_steps),
            experts=Phase(batch=max(1, size.paper_batch // clusters), learning_rate=first_rate),
        )

    k_first = size.random_clusters
    host = site.create(name(f"A-k{k_first}"), corpus, paper(k_first), clusters=k_first, base=config)
    trained = Trained(host=host)
    trained.experts.append(Experts(runs=(host,), protocol="A", clusters=k_first, fraction=0.5))

    def dense(batch: int, rate: float) -> Dense:
        run = site.baseline(name(f"dense-b{batch}-lr{rate:g}"), host, batch=batch, learning_rate=rate)
        made = Dense(run=run, batch=batch, learning_rate=rate)
        trained.dense.append(made)
        return made

    rates = size.learning_rates if plan.full else (first_rate,)
    sweep = [dense(batch, rate) for rate in rates for batch in sorted({*size.dense_batches, size.paper_batch})]
    trained.paper_dense = next(d.run for d in sweep if (d.batch, d.learning_rate) == (size.paper_batch, first_rate))
    # Experts of the host are the tail that the workers go on with while the sweep is looked at.
    site.wait([d.run for d in sweep])
    best = min(sweep, key=lambda d: validate(d.run, host))
    others = [] if plan.full else [dense(best.batch, rate) for rate in size.learning_rates[1:]]
    # The best at the edge of a sweep may not be the best there is.
    if best.batch == min(d.batch for d in sweep) > 1:
        others.append(dense(best.batch // 2, first_rate))
    elif best.batch == max(d.batch for d in sweep):
        others.append(dense(best.batch * 2, first_rate))

    site.wait([host])
    seed_dir, tokenizer = seed_of(host), tokenizer_of(host)
    for clusters in plan.clusters:
        if clusters != k_first:
            run = site.create(
                name(f"A-k{clusters}"), corpus, paper(clusters), clusters=clusters, base=seed_dir, tokenizer=tokenizer
            )
            trained.experts.append(Experts(runs=(run,), protocol="A", clusters=clusters, fraction=0.5))
    at_random = tuple(
        site.create(name(f"A-random{index}"), part, paper(k_first), clusters=1, base=seed_dir, tokenizer=tokenizer)
        for index, part in enumerate(parts(corpus, site.cache.parent / "corpus", count=k_first))
    )
    trained.experts.append(Experts(runs=at_random, protocol="A", clusters=k_first, fraction=0.5, random=True))

    site.wait([d.run for d in others])
    best = min([best, *others], key=lambda d: validate(d.run, host))
    trained.best_dense = best.run
    most = plan.clusters[-1]

    # A smaller batch, noisier steps: the rate goes with the square root.
    scaled = best.learning_rate * math.sqrt(size.expert_batch / best.batch)

    def honest(clusters: int, fraction: float, base: Path, multiple: float) -> Experts:
        rate = multiple * scaled
        kind = f"B{round(100 * fraction)}-k{clusters}-b{best.batch}-lr{best.learning_rate:g}-x{multiple:g}"
        run = site.create(
            name(kind),
            corpus,
            recipe(
                size,
                seed=seed,
                clusters=clusters,
                fraction=fraction,
                seed_phase=Phase(batch=best.batch, learning_rate=best.learning_rate, warmup_steps=size.warmup_steps),
                experts=Phase(batch=size.expert_batch, learning_rate=rate, warmup_steps=size.expert_warmup_steps),
            ),
            clusters=clusters,
            base=base,
            tokenizer=tokenizer,
        )
        return Experts(runs=(run,), protocol="B", clusters=clusters, fraction=fraction, learning_rate=rate)

    # All seeds first: each is one task, and workers are several.
    first_rate, *other_rates = size.expert_rates
    firsts = {fraction: honest(most, fraction, config, first_rate) for fraction in FRACTIONS}
    for fraction, first in firsts.items():
        site.wait([first.run])
        base = seed_of(first.run)
        by_rate = {first_rate: first} | {rate: honest(most, fraction, base, rate) for rate in other_rates}
        site.wait([experts.run for experts in by_rate.values()])
        trained.tried += by_rate.values()
        multiple, chosen = min(by_rate.items(), key=lambda item: validate_experts(item[1], host))
        trained.experts.append(chosen)
        _, *lesser = plan.honest_clusters(fraction)
        trained.experts += [honest(clusters, fraction, base, multiple) for clusters in lesser]
    site.wait([run for experts in trained.experts for run in experts.runs])
    return trained
