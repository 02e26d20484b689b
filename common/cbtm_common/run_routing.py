"""How a run's experts are mixed by default, as chosen on its validation documents once the experts were there.

It is stored with the run and takes precedence over the recipe, which was written before anything was measured. It is of
one clustering model: a temperature says nothing of another's distances or logits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cbtm_common.errors import InvalidArgument
from cbtm_common.files import FileSpec

_FIELD = "routing_json"


class RunRouting(BaseModel):
    """The choice, and what it was chosen by. Fields of a newer version are passed over.

    `interval` and `settle_after` count tokens of the context: weights follow it every `interval` tokens, and stay as
    they are after `settle_after`. Where no cluster weighs `seed_below`, the seed model stands in for the experts.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    temperature: float = Field(gt=0)
    top_k: int = Field(ge=1)
    interval: int = Field(default=1, ge=1)
    settle_after: int | None = Field(default=None, ge=1)
    seed_below: float | None = Field(default=None, gt=0, le=1)
    # `clustering_digest` of the run's files.
    clustering: str = Field(pattern=r"[0-9a-f]{64}")
    # Of the validation documents that it was chosen by.
    documents: int = Field(ge=1)
    tokens: int = Field(ge=1)
    perplexity: float = Field(gt=0)

    def to_json(self) -> str:
        """Canonical: sorted keys, no spaces."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> RunRouting:
        """Raises InvalidArgument, naming the field."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join([_FIELD, *map(str, first["loc"])])
            raise InvalidArgument(f"{where}: {first['msg']}", field=where) from error


def clustering_digest(files: Iterable[FileSpec]) -> str:
    """What tells one clustering model from another: SHA-256 over its files' paths and digests."""
    lines = sorted(f"{file.path} {file.sha256}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
