"""The run's tokenizer: loaded by Hub id or folder, or a byte-level BPE trained on the corpus."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cbtm_common.errors import InvalidArgument
from cbtm_coordinator.clustering.seed_model import first_line, local_or_hub

END_OF_TEXT = "<|endoftext|>"
DEFAULT_VOCAB_SIZE = 32_000


def load_tokenizer(source: str, output: Path) -> Any:
    """Loads a fast tokenizer by Hub id or folder and saves it to `output`. It must have an EOS token."""
    from transformers import AutoTokenizer

    source = local_or_hub(source, field="tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True, trust_remote_code=False)
    except Exception as error:  # what a broken folder makes transformers raise is of any class
        raise InvalidArgument(
            f"tokenizer: {source!r} cannot be loaded: {first_line(error)}", field="tokenizer"
        ) from error
    if not tokenizer.is_fast:
        raise InvalidArgument(f"tokenizer: {source!r} has no fast version (tokenizer.json)", field="tokenizer")
    if tokenizer.eos_token_id is None:
        raise InvalidArgument(f"tokenizer: {source!r} has no end-of-sequence token", field="tokenizer")
    tokenizer.save_pretrained(output)
    return tokenizer


def check_vocab_size(vocab_size: int) -> None:
    """Raises InvalidArgument when a byte-level BPE cannot be so small."""
    if vocab_size < 257:
        raise InvalidArgument(
            f"from-scratch: vocab_size {vocab_size} is under the 256 bytes and the end-of-text token",
            field="vocab_size",
        )


def train_tokenizer(texts: Iterable[str], output: Path, *, vocab_size: int, context: int) -> Any:
    """Trains a byte-level BPE with `vocab_size` entries on `texts` and saves it as a Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    check_vocab_size(vocab_size)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=core,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(output)
    return tokenizer
