"""`CbtmConfig`: what the experts of a saved ensemble have in common, and how they are mixed."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from cbtm._folder import MODEL_TYPE


class CbtmConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]  # its __init_subclass__ is untyped
    """config.json at the top of a saved ensemble; the experts' own configs lie beside their weights.

    - `num_experts_per_tok`: experts mixed at each token (the paper's top k); None is the run's default.
    - `routing_temperature`: T of c-BTM's Eq. 2; None is the run's default.
    - `routing_distance`: "squared" (the paper) or "quartic" (the authors' code).
    - `routing_policy`: "prefix" (routed anew at each token), "prompt" (once) or "fixed", which needs
      `routing_weights`, one number for each expert.
    - `routing_interval`, `routing_settle_after`: with "prefix", route anew every so many tokens, and no more after so
      many; None never settles.
    - `routing_seed_below`: where no cluster weighs as much, the seed model stands in; None never.

    They may be given to `from_pretrained`, like every field of a config.
    """

    model_type = MODEL_TYPE

    vocab_size: int | None = None
    max_position_embeddings: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    use_cache: bool = True
    num_experts: int | None = None
    num_experts_per_tok: int | None = None
    routing_temperature: float | None = None
    routing_distance: str = "squared"
    routing_policy: str = "prefix"
    routing_weights: list[float] | None = None
    routing_interval: int = 1
    routing_settle_after: int | None = None
    routing_seed_below: float | None = None

    def to_diff_dict(self) -> dict[str, Any]:
        """Also where a field has its default: a folder says how it is mixed."""
        fields: dict[str, Any] = super().to_diff_dict()
        for name in ("num_experts", "num_experts_per_tok", "routing_temperature", "routing_distance", "routing_policy"):
            fields.setdefault(name, getattr(self, name))
        return fields
