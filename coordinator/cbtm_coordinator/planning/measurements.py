"""What advice is drawn from: this project's own studies, and the figures of papers, each with its source."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One mixture of a study, beside the dense model of its protocol that trained on as many tokens.

    Perplexities are of test documents, means over `seeds`. Protocol B's dense model had its batch and rate tuned.
    """

    source: str
    parameters: int
    train_tokens: int
    seeds: int
    protocol: str
    clusters: int
    seed_fraction: float
    router: str
    policy: str
    k: int
    perplexity: float
    dense_perplexity: float

    @property
    def gain(self) -> float:
        """Share of the dense model's perplexity that the experts save."""
        return 1 - self.perplexity / self.dense_perplexity

    @property
    def expert_tokens_per_parameter(self) -> float:
        """Tokens that each expert trains on after the seed phase, for each of its parameters."""
        return self.train_tokens * (1 - self.seed_fraction) / self.clusters / self.parameters


@dataclass(frozen=True, kw_only=True)
class Published:
    """A paper's gain at top-1, at the same tokens and active size. Its number of tokens is not taken over here."""

    source: str
    parameters: int
    clusters: int
    gain: float


# SMALLTALK LM: experts trained from scratch, each with a router of 4.4 M parameters on a prefix.
PUBLISHED = tuple(
    Published(source="SMALLTALK LM, arXiv 2410.03529", parameters=parameters, clusters=clusters, gain=gain)
    for parameters, clusters, gain in (
        (335_000_000, 4, 0.085),
        (335_000_000, 32, 0.136),
        (1_300_000_000, 4, 0.039),
        (1_300_000_000, 32, 0.176),
    )
)


def measurements() -> tuple[Measurement, ...]:
    """Those that this version ships (`scripts/generate_measurements.py`)."""
    rows = json.loads((files(__package__) / "measurements.json").read_text("utf-8"))
    return tuple(Measurement(**row) for row in rows)
