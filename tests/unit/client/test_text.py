"""Where the text of a prefix ends, for tokens that cut characters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from cbtm._text import (
    ByteLevelDetokenizer,
    TextState,
    WindowDetokenizer,
    _byte_characters,
    decode_prefixes,
    detokenizer_of,
)
from cbtm_common.errors import InvalidArgument

TEXT = "Naïve café: 東京 🜁🜂 “quoted”\n\tمرحبا end"


class FakeTokenizer:
    """The four things that decoding asks of a transformers tokenizer, over a `tokenizers` one."""

    def __init__(self, backend: Tokenizer, special: list[int]) -> None:
        self.backend_tokenizer = backend
        self.all_special_ids = special

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab()

    def decode(self, ids: list[int], **_: Any) -> str:
        return self.backend_tokenizer.decode(ids, skip_special_tokens=True)

    def encode(self, text: str) -> list[int]:
        return self.backend_tokenizer.encode(text).ids


@pytest.fixture(scope="module")
def byte_level() -> FakeTokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 4, trainer)
    backend.add_tokens(["an added token"])
    return FakeTokenizer(backend, [0])


@pytest.fixture(scope="module")
def byte_fallback() -> FakeTokenizer:
    """As SentencePiece models have it: pieces with ▁ for a space, single bytes for the rest."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": 1 + byte for byte in range(256)}}
    for piece in ("▁", "e", "n", "d", "▁e", "nd"):
        vocabulary[piece] = len(vocabulary)
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[("▁", "e"), ("n", "d")], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return FakeTokenizer(backend, [0])


def test_the_byte_alphabet_is_that_of_byte_level_vocabularies() -> None:
    assert sorted(_byte_characters()) == sorted(pre_tokenizers.ByteLevel.alphabet())


def test_every_prefix_of_a_byte_level_text_ends_at_its_last_complete_character(byte_level: FakeTokenizer) -> None:
    ids = byte_level.encode(TEXT)
    text, ends = decode_prefixes(detokenizer_of(byte_level), ids)  # type: ignore[arg-type]
    assert text == TEXT
    assert len(ends) == len(ids) + 1
    assert len(set(ends)) < len(ends), "some token must end inside a character"
    for t, end in enumerate(ends):
        assert text[:end] == byte_level.decode(ids[:t]).rstrip("�")


def test_bytes_that_are_no_text_hold_the_same_words_as_the_tokenizer_finds(byte_level: FakeTokenizer) -> None:
    detokenizer = ByteLevelDetokenizer(byte_level)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(0, 282, size=30).tolist()
        text, ends = decode_prefixes(detokenizer, ids)
        for t in range(31):
            assert text[: ends[t]].replace("�", "") == byte_level.decode(ids[:t]).replace("�", "")


def test_special_tokens_add_no_text_and_added_ones_do(byte_level: FakeTokenizer) -> None:
    added = byte_level.get_vocab()["an added token"]
    text, ends = decode_prefixes(ByteLevelDetokenizer(byte_level), [0, added, 0])  # type: ignore[arg-type]
    assert (text, ends) == ("an added token", [0, 0, 14, 14])


def test_every_prefix_with_byte_fallback_is_what_the_tokenizer_decodes(byte_fallback: FakeTokenizer) -> None:
    ids = byte_fallback.encode("end é 東 end")
    detokenizer = detokenizer_of(byte_fallback)  # type: ignore[arg-type]
    assert isinstance(detokenizer, WindowDetokenizer)
    text, ends = decode_prefixes(detokenizer, ids)
    assert text == byte_fallback.decode(ids) == "end é 東 end"
    for t, end in enumerate(ends):
        assert text[:end] == byte_fallback.decode(ids[:t]).rstrip("�")


def test_contexts_may_branch_in_the_middle_of_a_character(byte_level: FakeTokenizer) -> None:
    detokenizer = ByteLevelDetokenizer(byte_level)  # type: ignore[arg-type]
    byte = {bytes_: i for i, bytes_ in detokenizer._bytes.items() if len(bytes_) == 1}
    half, nothing = detokenizer.push(TextState(), byte[b"\xc3"])
    assert nothing == ""
    assert detokenizer.push(half, byte[b"\xa9"])[1] == "é"
    assert detokenizer.push(half, byte[b"\xa8"])[1] == "è"
    assert detokenizer.push(half, byte[b"a"])[1] == "�a"


def test_a_tokenizer_without_a_fast_form_is_refused_with_the_remedy() -> None:
    with pytest.raises(InvalidArgument, match=r"tokenizer\.json"):
        detokenizer_of(object())  # type: ignore[arg-type]
