"""A causal language model for training, from a Hugging Face directory.

Only safetensors and configs of architectures that transformers itself knows are read: nothing in the directory is
executed, and nothing is fetched. Weights are float32 whatever the files hold.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging as transformers_logging

from cbtm_common.errors import IntegrityError, InvalidArgument

# Names under which configs keep the dropout of embeddings, residual branches and attention.
_DROPOUT_FIELDS = (
    "attention_dropout",
    "attention_probs_dropout_prob",
    "attn_dropout",
    "attn_pdrop",
    "dropout",
    "dropout_rate",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "resid_dropout",
    "resid_pdrop",
    "residual_dropout",
)


# transformers' "sdpa", for inputs that need no mask but the causal one. Under that name each pass builds a mask: that
# costs a wait for the device, and once the model is compiled, flash attention, which takes none.
_CAUSAL = "cbtm_causal"
# Architectures whose attention is causal and nothing more, as long as their config sets no window.
_CAUSAL_ARCHITECTURES = frozenset(
    "cohere gemma gpt2 gpt_neox granite llama mistral mixtral olmo olmo2 opt phi phi3 qwen2 qwen3 smollm3"
    " starcoder2".split()
)


def load_model(
    directory: Path, *, dropout: float | None, sequence_length: int
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(the model on the CPU in float32, in training mode; its skeleton). It is for full sequences of `sequence_length`.

    The skeleton has no weights (meta device) and the config as it was, without the recipe's dropout; it is what a
    checkpoint is written with. Raises InvalidArgument for a directory that is no such model or needs code of its own,
    IntegrityError for missing, unreadable or misshapen weights.
    """
    # Its bars would tear the caller's own display.
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    config = _read_config(directory)
    original = copy.deepcopy(config)
    if dropout is not None:
        set_dropout(config, dropout)
    model = _load(directory, config, "sdpa" if attends_in_windows(config, sequence_length) else _causal_attention())
    with torch.device("meta"):
        skeleton = type(model)(original)
    skeleton.generation_config = copy.deepcopy(model.generation_config)
    # How names and layouts in the files map to the module's, learnt while loading; saving maps them back.
    setattr(skeleton, "_weight_conversions", getattr(model, "_weight_conversions", None))  # noqa: B010  (not a module)
    model.train()
    return model, skeleton


def _read_config(directory: Path) -> PreTrainedConfig:
    if not (directory / "config.json").is_file():
        raise InvalidArgument(f"model_dir: {directory} holds no config.json", field="model_dir")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        raise InvalidArgument(f"model_dir: {directory}/config.json: {error}", field="model_dir") from error
    return config


def attends_in_windows(config: PreTrainedConfig, sequence_length: int) -> bool:
    """Whether attention within a sequence may be anything but causal; also for an architecture that is not known."""
    text = config.get_text_config()
    windows = [getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size")]
    layers = getattr(text, "layer_types", None) or ["full_attention"]
    return (
        text.model_type not in _CAUSAL_ARCHITECTURES
        or any(window is not None and window < sequence_length for window in windows)
        or any(layer != "full_attention" for layer in layers)
    )


def _causal_attention() -> str:
    AttentionInterface.register(_CAUSAL, sdpa_attention_forward)
    return _CAUSAL


def _load(directory: Path, config: PreTrainedConfig, attention: str) -> PreTrainedModel:
    from safetensors import SafetensorError

    options: dict[str, Any] = {
        "config": config,
        "dtype": torch.float32,
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    # transformers types this as the model alone, whatever the options.
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        try:
            model, info = load(directory, attn_implementation=attention, **options)
        except ValueError as error:
            # transformers refuses, by a ValueError that names it, where an architecture has no such attention.
            if "scaled_dot_product_attention" not in str(error):
                raise
            model, info = load(directory, attn_implementation="eager", **options)
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        raise IntegrityError(f"model_dir: {directory}: its weights cannot be loaded: {error}") from error
    wrong = sorted(info["missing_keys"]) or sorted(str(key) for key in info["mismatched_keys"])
    if wrong:
        raise IntegrityError(f"model_dir: {directory}: {len(wrong)} weights are missing or misshapen: {wrong[0]}")
    assert isinstance(model, PreTrainedModel)
    return model


def set_dropout(config: PreTrainedConfig, probability: float) -> list[str]:
    """Sets every dropout that the config has; returns the names set, none for an architecture without dropout."""
    text = config.get_text_config()
    names = [name for name in _DROPOUT_FIELDS if isinstance(getattr(text, name, None), int | float)]
    for name in names:
        setattr(text, name, probability)
    return names


def context_length(config: PreTrainedConfig) -> int | None:
    """Longest sequence that the model's positions allow, in tokens; None when it has no limit of its own."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def vocabulary_size(model: PreTrainedModel) -> int:
    """Rows of the input embedding."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


def make_deterministic(device: torch.device, *, strict: bool = True) -> None:
    """Makes operations on a CUDA device give the same bits each time, for the whole process.

    A CPU does so with the same number of threads. Must come before the first matrix product on the device, which is
    when cuBLAS reads its workspace setting. Strict, an operation without a deterministic form raises
    (`lacks_determinism`); else it warns, and memory-efficient attention too takes its faster, inexact path.
    """
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    # Costs a pass over every allocation, and matters only to code that reads memory it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def lacks_determinism(error: RuntimeError) -> bool:
    """Whether an operation was refused because it has no deterministic form."""
    return "does not have a deterministic implementation" in str(error)
