"""Tiny models and tokenizers for tests, built from a config: no network, a few hundred kilobytes, milliseconds.

torch and transformers are imported inside the functions, so that importing this module costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

EOS_TOKEN = "<|endoftext|>"
EOS_TOKEN_ID = 0

Architecture = Literal["llama", "gpt2"]


def make_tiny_model(
    directory: Path | str,
    *,
    architecture: Architecture = "llama",
    vocab_size: int = 256,
    seed: int = 0,
    hidden_size: int = 32,
    layers: int = 2,
    context: int = 128,
    dropout: float = 0.0,
) -> Path:
    """Writes a random causal language model as a Hugging Face directory (float32 safetensors), and returns it.

    Equal arguments give equal weights; two seeds give two models. The token with id 0 is EOS, as in
    `make_tiny_tokenizer`. The global random state of torch is left as it was.
    """
    _offline()
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig

    config: PreTrainedConfig
    if architecture == "llama":
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=context,
            attention_dropout=dropout,
            tie_word_embeddings=False,
            bos_token_id=EOS_TOKEN_ID,
            eos_token_id=EOS_TOKEN_ID,
        )
    else:
        config = GPT2Config(
            vocab_size=vocab_size,
            n_embd=hidden_size,
            n_layer=layers,
            n_head=4,
            n_positions=context,
            attn_pdrop=dropout,
            embd_pdrop=dropout,
            resid_pdrop=dropout,
            bos_token_id=EOS_TOKEN_ID,
            eos_token_id=EOS_TOKEN_ID,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    directory = Path(directory)
    model.save_pretrained(directory)
    return directory


def make_tiny_tokenizer(directory: Path | str, texts: Iterable[str] = (), vocab_size: int = 256 + 1) -> Path:
    """Trains a byte-level BPE fast tokenizer on `texts`, writes it as a Hugging Face directory, and returns that.

    Its only special token is EOS (`EOS_TOKEN`, id 0). All 256 bytes are in its alphabet, so that every text can be
    encoded and decodes to itself; `vocab_size` is at least 257, and is what it gets where the texts give enough
    merges. Load it with `AutoTokenizer.from_pretrained(directory)`.
    """
    _offline()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < 257:
        raise ValueError(f"vocab_size: {vocab_size} is under 257 (256 bytes and EOS)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=EOS_TOKEN, clean_up_tokenization_spaces=False
    ).save_pretrained(directory)
    return directory


def _offline() -> None:
    """Tests load local folders only; a name that is not one must fail at once, not reach for the Hub."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
