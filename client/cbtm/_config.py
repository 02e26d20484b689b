"""The `transformers` config of a saved ensemble: what its experts have in common.

Importing this module registers `model_type` "cbtm", so that tokenizers and configs load from an ensemble's folder.
"""

from __future__ import annotations

from transformers import AutoConfig, PreTrainedConfig

from cbtm._folder import MODEL_TYPE


class CbtmConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]  # its __init_subclass__ is untyped
    """config.json at the top of a saved ensemble; the experts' own configs lie beside their weights."""

    model_type = MODEL_TYPE


AutoConfig.register(MODEL_TYPE, CbtmConfig, exist_ok=True)
