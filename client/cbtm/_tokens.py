"""An ensemble's tokenizer and how texts are put to its experts: every text begins after an end-of-text token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cbtm._alike import tokenizer_digest
from cbtm._scoring import TokenSequence
from cbtm._text import detokenizer_of
from cbtm_common.errors import InvalidArgument

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextCodec:
    """Between texts and token ids. Raises InvalidArgument when `directory` holds no tokenizer that can be used."""

    def __init__(self, directory: Path) -> None:
        self.tokenizer = _load_tokenizer(directory)
        self.detokenizer = detokenizer_of(self.tokenizer)
        self.start_id = _start_id(self.tokenizer)
        path = directory / "tokenizer.json"
        self.digest = tokenizer_digest(path) if path.is_file() else None

    @property
    def end_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        return frozenset({self.start_id})

    def check(self, vocabulary: int) -> None:
        """Raises InvalidArgument when experts of that many ids do not know all of the tokenizer's."""
        size = max(self.tokenizer.get_vocab().values(), default=-1) + 1
        if size > vocabulary:
            raise InvalidArgument(
                f"tokenizer: it has {size} ids and the experts know {vocabulary}: they do not belong together",
                field="tokenizer",
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, no special token added."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [int(i) for i in ids]

    def sequence_of(self, token_ids: Sequence[int]) -> TokenSequence:
        """A document by its token ids, end-of-text left out, as it is scored."""
        return TokenSequence(ids=(self.start_id, *token_ids))

    def sequence(self, text: str, *, prompt: str = "") -> TokenSequence:
        """A text as it is scored, after its prompt."""
        before = self.encode(prompt) if prompt else []
        return TokenSequence(ids=(self.start_id, *before, *self.encode(text)), first=1 + len(before))

    def prompt(self, text: str, *, number: int, context: int | None) -> list[int]:
        """A prompt to continue. Raises InvalidArgument when it is empty or leaves no room in the context."""
        ids = self.encode(text)
        if not ids:
            raise InvalidArgument(f"prompt: number {number} is empty; give at least one character", field="prompt")
        if context is not None and len(ids) + 1 > context:
            raise InvalidArgument(
                f"prompt: number {number} has {len(ids)} tokens, and the experts' context holds {context - 1} after "
                "the start; shorten it",
                field="prompt",
            )
        return [self.start_id, *ids]


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    from cbtm._auto import register_config

    # The folder may be a saved ensemble's, with a config.json of its model type.
    register_config()
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise InvalidArgument(f"tokenizer: {directory} holds none that loads: {error}", field="tokenizer") from error
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    return tokenizer


def _start_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands before every document in training: the end of the one before."""
    for name in ("eos_token_id", "bos_token_id"):
        token_id = getattr(tokenizer, name, None)
        if isinstance(token_id, int):
            return token_id
    raise InvalidArgument("tokenizer: it has no end-of-text token", field="tokenizer")
