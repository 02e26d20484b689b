"""The recipe: what fixes the mathematics of training.

A worker may choose micro-batch, accumulation, compile and device placement, never anything in here. A recipe
is written in TOML, travels as canonical JSON, and is part of what a checkpoint is a function of.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cbtm_common.errors import InvalidArgument


class Decay(StrEnum):
    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"


class Precision(StrEnum):
    # bf16 autocast where the device has it; weights and optimizer state stay in float32.
    BF16 = "bf16"
    FP32 = "fp32"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class OptimizerRecipe(_Strict):
    """AdamW (Loshchilov & Hutter, 2019). Defaults are c-BTM's."""

    learning_rate: float = Field(default=2e-4, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-6, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    # Global norm; 0 turns clipping off.
    gradient_clip: float = Field(default=1.0, ge=0)


class ScheduleRecipe(_Strict):
    """Learning rate: linear warm-up, then decay to `final_ratio` of the peak."""

    warmup_steps: int = Field(default=0, ge=0)
    decay: Decay = Decay.LINEAR
    final_ratio: float = Field(default=0.0, ge=0, le=1)


class SeedRecipe(_Strict):
    """The SEED task of a run from scratch."""

    # Share of the run's whole token budget that the seed phase takes; 0 for none.
    fraction: float = Field(default=0.5, ge=0, lt=1)
    # Peak learning rate of the seed phase; the optimizer's when unset.
    learning_rate: float | None = Field(default=None, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    # Sequences a step of the seed phase; the experts' when unset. One expert sees 1/K of the data, and a batch of 1/K
    # of the seed's gives it as many steps (c-BTM).
    global_batch: int | None = Field(default=None, ge=1)


class LeaseRecipe(_Strict):
    """Bounds on leases, in seconds. They do not touch the mathematics.

    Each lease begins with `lease_seconds`, `checkpoint_seconds` and `stall_seconds`. What a worker is measured to need
    makes them longer, up to their `max_`; one that is below its minimum counts as equal to it.
    """

    lease_seconds: float = Field(default=120.0, ge=2)
    max_lease_seconds: float = Field(default=1800.0, ge=2)
    renew_seconds: float = Field(default=30.0, ge=0.2)
    checkpoint_seconds: float = Field(default=600.0, ge=0.2)
    max_checkpoint_seconds: float = Field(default=14_400.0, ge=1)
    # A worker that renews without a step or a byte of progress for so long is taken to hang.
    stall_seconds: float = Field(default=600.0, ge=1)
    max_stall_seconds: float = Field(default=14_400.0, ge=1)
    max_attempts: int = Field(default=5, ge=1)

    @model_validator(mode="after")
    def _renew_before_expiry(self) -> LeaseRecipe:
        if self.renew_seconds * 2 > self.lease_seconds:
            raise ValueError("renew_seconds must be at most half of lease_seconds")
        return self


class RouterKind(StrEnum):
    # c-BTM's: by the distance of the context's embedding to each centroid.
    CENTROID = "centroid"
    # A classifier trained on prefixes when the run is made; it says more of short contexts.
    LEARNED = "learned"


class RoutingRecipe(_Strict):
    """Defaults for who uses the ensemble: which router, its temperature and the experts in use.

    Documents are sharded by the centroids whatever the router. `temperature` None is the router's own: 0.1 in Eq. 2, or
    what calibrates a learned one.
    """

    router: RouterKind = RouterKind.CENTROID
    temperature: float | None = Field(default=None, gt=0)
    top_k: int = Field(default=2, ge=1)


class Recipe(_Strict):
    """All of it. `steps` is of each expert; `global_batch` counts sequences of `sequence_length` tokens."""

    sequence_length: int = Field(default=2048, ge=8)
    global_batch: int = Field(default=32, ge=1)
    steps: int = Field(default=1000, ge=1)
    # Root of every random number of the run.
    seed: int = Field(default=0, ge=0, lt=2**63)
    precision: Precision = Precision.BF16
    # Dropout of the model while it trains; None keeps what its config says.
    dropout: float | None = Field(default=None, ge=0, lt=1)
    # Share of documents held out of training, by a hash of their ids.
    held_out_fraction: float = Field(default=0.02, gt=0, lt=0.5)
    optimizer: OptimizerRecipe = OptimizerRecipe()
    schedule: ScheduleRecipe = ScheduleRecipe()
    seed_phase: SeedRecipe = SeedRecipe()
    lease: LeaseRecipe = LeaseRecipe()
    routing: RoutingRecipe = RoutingRecipe()

    def to_json(self) -> str:
        """Canonical: sorted keys, no spaces; equal recipes give equal strings."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def training_sha256(self) -> str:
        """Digest of what the recipe says about training, which checkpoints carry.

        Leases, routing and the held-out split do not touch weights. Fields at their default are left out, so that a
        later version's new field leaves the digests of older recipes as they were.
        """
        said = self.model_dump(mode="json", exclude={"lease", "routing", "held_out_fraction"}, exclude_defaults=True)
        return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def peak_learning_rate(self, *, seed: bool) -> float:
        """The highest rate of the schedule: a SEED task may have one of its own."""
        return (self.seed_phase.learning_rate if seed else None) or self.optimizer.learning_rate

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Raises InvalidArgument, naming the field."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise InvalidArgument(f"recipe_json: is not JSON: {error}", field="recipe_json") from error
        return cls._checked(data, source="recipe_json")

    @classmethod
    def from_toml(cls, path: Path) -> Recipe:
        """Raises InvalidArgument, naming the file and the field."""
        try:
            data = tomllib.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise InvalidArgument(f"recipe: there is no file {path}", field="recipe") from None
        except OSError as error:
            raise InvalidArgument(f"recipe: {path} cannot be read: {error.strerror}", field="recipe") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InvalidArgument(f"recipe: {path} is not TOML: {error}", field="recipe") from error
        return cls._checked(data, source=str(path))

    @classmethod
    def _checked(cls, data: Any, *, source: str) -> Recipe:
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise InvalidArgument(f"recipe: {source}: {field}: {first['msg']}", field=field) from error

    def for_seed(self) -> Recipe:
        """What the SEED task trains by: the same, with the seed phase's batch."""
        batch = self.seed_phase.global_batch
        return self if batch is None else self.model_copy(update={"global_batch": batch})

    def of_task(self, *, seed: bool) -> Recipe:
        """What a task trains by: the SEED task `for_seed`, any other this."""
        return self.for_seed() if seed else self

    def step_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.global_batch * self.sequence_length

    def seed_steps(self, clusters: int) -> int:
        """Steps of the SEED task so that it takes `seed_phase.fraction` of all training tokens."""
        fraction = self.seed_phase.fraction
        sequences = self.steps * clusters * self.global_batch * fraction / (1 - fraction)
        return round(sequences / self.for_seed().global_batch)

    def budget_tokens(self, clusters: int, *, from_scratch: bool) -> int:
        """Tokens that all tasks of a run train on together; `from_scratch` with the seed phase."""
        seed = self.seed_steps(clusters) * self.for_seed().step_tokens() if from_scratch else 0
        return seed + self.steps * clusters * self.step_tokens()

    def dense_beside(self, clusters: int, *, from_scratch: bool) -> tuple[Recipe, int]:
        """(recipe, steps) of a dense model that trains on as many tokens; from scratch it trains as the seed does."""
        recipe = self
        if from_scratch:
            seed = self.seed_phase
            recipe = self.for_seed().model_copy(
                update={
                    "optimizer": self.optimizer.model_copy(
                        update={"learning_rate": seed.learning_rate or self.optimizer.learning_rate}
                    ),
                    "schedule": self.schedule.model_copy(update={"warmup_steps": seed.warmup_steps}),
                }
            )
        return recipe, max(1, round(self.budget_tokens(clusters, from_scratch=from_scratch) / recipe.step_tokens()))
