"""Whether experts and tokenizer belong together, judged before any weight is read.

Experts of one ensemble share what their outputs mean: family, vocabulary, context, special tokens and tokenizer. They
may differ in size (layers, width, heads): probabilities are mixed, and nothing else of theirs meets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from cbtm_common.errors import IntegrityError, InvalidArgument

# Field -> names it has in config.json, by family.
_SHARED = {
    "model_type": ("model_type",),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "bos_token_id": ("bos_token_id",),
    "eos_token_id": ("eos_token_id",),
}


class ConfigSource(Protocol):
    """An expert by its name and its config.json."""

    @property
    def name(self) -> str: ...
    def config_path(self) -> Path: ...


def check_alike(sources: Sequence[ConfigSource]) -> None:
    """Raises InvalidArgument unless all experts' config.json agree in what they must share."""
    first: dict[str, Any] | None = None
    for source in sources:
        config = _read_json(source)
        # Of a multimodal model, the language part.
        config = {**config.get("text_config", {}), **config}
        shared = {field: next((config[n] for n in names if n in config), None) for field, names in _SHARED.items()}
        first = first or shared
        for field, value in shared.items():
            if value != first[field]:
                raise InvalidArgument(
                    f"{source.name} and {sources[0].name} do not fit together: {field} is {value!r} in one and "
                    f"{first[field]!r} in the other; experts of one ensemble share family, vocabulary, context and "
                    "special tokens",
                    field="experts",
                )


def check_tokenizer(directory: Path, expected: str | None, *, name: str) -> None:
    """Raises InvalidArgument when an expert brings a tokenizer of its own that is another than `expected` tells."""
    path = directory / "tokenizer.json"
    if expected is not None and path.is_file() and tokenizer_digest(path) != expected:
        raise InvalidArgument(
            f"{name}: its tokenizer is not the ensemble's: {path} has other tokens or merges; experts of one ensemble "
            "share one tokenizer",
            field="tokenizer",
        )


def tokenizer_digest(path: Path) -> str:
    """SHA-256 of what a tokenizer.json makes of text: tokens with their ids, and merges; however it is written."""
    stat = path.stat()
    return _digest(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=256)
def _digest(path: Path, modified: int, size: int) -> str:
    try:
        data = json.loads(path.read_text("utf-8"))
        model = data["model"]
        vocabulary = model["vocab"]
        content = {
            "type": model.get("type"),
            "vocab": sorted(vocabulary.items()) if isinstance(vocabulary, dict) else vocabulary,
            # Older files write a merge as "a b".
            "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []],
            "added": sorted((token["id"], token["content"]) for token in data.get("added_tokens") or []),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} cannot be read as a tokenizer: {error!r}") from error
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _read_json(source: ConfigSource) -> dict[str, Any]:
    path = source.config_path()
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{source.name}: {path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise IntegrityError(f"{source.name}: {path} holds no JSON object")
    return config
