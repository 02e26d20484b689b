"""Experts trained honestly and not, each as evaluators and auditors see it: what `bench.make_works` measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

FILE = Path(__file__).with_suffix(".safetensors")
SETS = ("own", "train", "canary")
PRECISIONS = ("fp32", "bf16")

Losses = npt.NDArray[np.float32]


class Kind(StrEnum):
    HONEST = "honest"
    SEED_RETURNED = "seed returned"
    # As far from the seed as honest training takes it, tensor by tensor.
    NOISE = "noise"
    # All steps, on another cluster's shards.
    OTHER_DATA = "other data"
    # A twentieth of the steps.
    FEW_STEPS = "few steps"
    # Half of the steps, with the whole schedule drawn together; half of each segment.
    HALF_STEPS = "half the steps"


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """`losses` and `base_losses` are by set, then precision, [N] each, N sequences of nats a token.

    `loss` is of its last batch, as its worker saw it. `deviations` of replays are by how they were computed: "same",
    and of honest work "micro-batch" and "bf16", too.
    """

    kind: Kind
    cluster: int
    order: int
    loss: float
    base_losses: Mapping[str, Mapping[str, Losses]]
    losses: Mapping[str, Mapping[str, Losses]]
    deviations: Mapping[str, list[float]]


def load(path: Path = FILE) -> list[Work]:
    """What `save` wrote."""
    with safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["works"])
    tensors = load_file(path)

    def sets(name: str) -> dict[str, dict[str, Losses]]:
        return {s: {p: tensors[f"{name}/{s}/{p}"] for p in PRECISIONS} for s in SETS}

    return [
        Work(
            kind=Kind(said["kind"]),
            cluster=said["cluster"],
            order=said["order"],
            loss=said["loss"],
            base_losses=sets(f"base/{said['cluster']}"),
            losses=sets(f"work/{number}"),
            # JSON has no infinity.
            deviations={
                how: [math.inf if d is None else d for d in found] for how, found in said["deviations"].items()
            },
        )
        for number, said in enumerate(about)
    ]


def save(found: Sequence[Work], path: Path) -> None:
    tensors: dict[str, npt.NDArray[Any]] = {}
    about = []
    for number, work in enumerate(found):
        for name, losses in ((f"base/{work.cluster}", work.base_losses), (f"work/{number}", work.losses)):
            tensors |= {f"{name}/{s}/{p}": losses[s][p] for s in SETS for p in PRECISIONS}
        deviations = {
            how: [round(d, 6) if math.isfinite(d) else None for d in found] for how, found in work.deviations.items()
        }
        about.append(
            {
                "kind": work.kind.value,
                "cluster": work.cluster,
                "order": work.order,
                "loss": round(work.loss, 4),
                "deviations": deviations,
            }
        )
    save_file(tensors, path, metadata={"works": json.dumps(about)})
