"""Token ids to text as it grows, with the exact end of every prefix.

Routing embeds the text of a context. A token of a byte-level vocabulary may end inside a character, so the text of a
prefix is what is complete so far: the bytes of an unfinished character wait for the token that finishes it. What was
emitted never changes, so one pass over a document gives the text and, for every t, how much of it t tokens make.

Special tokens add no text. Guaranteed: for byte-level vocabularies, `text[:ends[t]]` holds the same words as the
tokenizer's own decoding of the first t tokens. For others (byte fallback, word pieces) the same holds wherever the
tokenizer decodes a sequence by decoding its pieces in order.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cbtm_common.errors import InvalidArgument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "�"


@dataclass(frozen=True)
class TextState:
    """Where decoding stands after some tokens. Immutable: contexts may branch."""

    # Bytes of an unfinished character (byte-level vocabularies).
    pending: bytes = b""
    # The last ids, and how many of them are emitted already (all other vocabularies).
    window: tuple[int, ...] = field(default=())
    emitted: int = 0


class Detokenizer(Protocol):
    """Decodes one token at a time."""

    def push(self, state: TextState, token: int) -> tuple[TextState, str]:
        """The state after `token`, and the text that it completes (often a word, sometimes nothing)."""
        ...


def detokenizer_of(tokenizer: PreTrainedTokenizerBase) -> Detokenizer:
    """The fastest exact one for this tokenizer. Raises InvalidArgument when it is not backed by `tokenizers`."""
    from tokenizers import decoders

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InvalidArgument(
            "tokenizer: it has no fast (Rust) form; convert it with transformers and save tokenizer.json",
            field="tokenizer",
        )
    if isinstance(backend.decoder, decoders.ByteLevel):
        return ByteLevelDetokenizer(tokenizer)
    return WindowDetokenizer(tokenizer)


def decode_prefixes(detokenizer: Detokenizer, ids: Sequence[int]) -> tuple[str, list[int]]:
    """(text, ends): `text[:ends[t]]` is the text of `ids[:t]`, for t from 0 to len(ids)."""
    state, pieces, ends, length = TextState(), [], [0], 0
    for token in ids:
        state, piece = detokenizer.push(state, token)
        if piece:
            pieces.append(piece)
            length += len(piece)
        ends.append(length)
    return "".join(pieces), ends


class ByteLevelDetokenizer:
    """For GPT-2's scheme: every token is a string of bytes. Bytes that are not UTF-8 become U+FFFD."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        special = set(tokenizer.all_special_ids)
        byte_of = {character: byte for byte, character in enumerate(_byte_characters())}
        self._bytes: dict[int, bytes] = {}
        for token, index in tokenizer.get_vocab().items():
            if index in special:
                continue
            known = all(character in byte_of for character in token)
            self._bytes[index] = bytes(byte_of[c] for c in token) if known else token.encode()

    def push(self, state: TextState, token: int) -> tuple[TextState, str]:
        data = self._bytes.get(token, b"")
        if not data:
            return state, ""
        joined = state.pending + data
        text, used = codecs.utf_8_decode(joined, "replace", False)
        return TextState(pending=joined[used:]), text


class WindowDetokenizer:
    """For any tokenizer: decodes the last few tokens with and without the newest, and takes the difference."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)

    def push(self, state: TextState, token: int) -> tuple[TextState, str]:
        if token in self._special:
            return state, ""
        window = (*state.window, token)
        before = self._decode(window[: state.emitted])
        after = self._decode(window)
        if len(after) <= len(before) or after.endswith(_REPLACEMENT):
            return TextState(window=window, emitted=state.emitted), ""
        # What was emitted before the newest text is context enough for the next token.
        return TextState(window=window[state.emitted :], emitted=len(window) - state.emitted), after[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def _byte_characters() -> list[str]:
    """The character by which byte-level vocabularies write each byte: itself where printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + n) for n in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]
