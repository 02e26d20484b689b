"""Text from the mixture: greedy or sampled, many prompts at a time, each row ending on its own.

Temperature and the nucleus act on the mixture's probabilities, after the experts are mixed. Every row draws from a
generator of its own, so that a row's text does not depend on the batch it is in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from cbtm._decoder import MixtureDecoder
from cbtm._text import Detokenizer, TextState
from cbtm_common.errors import InvalidArgument

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """`temperature` 0 is greedy. `top_k_tokens` and `top_p` bound what is sampled; None does not.

    A text ends at a token of `end_tokens`, before the first of the `stop` strings, after `max_new_tokens`, or when the
    experts' context (`max_length` tokens, prompt included) is full.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float | None = None
    top_k_tokens: int | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    end_tokens: frozenset[int] = frozenset()
    max_length: int | None = None

    def check(self) -> Self:
        """Itself, if its numbers make sense. Raises InvalidArgument, naming the field."""
        if self.max_new_tokens < 1:
            raise InvalidArgument(f"max_new_tokens: {self.max_new_tokens} is under 1", field="max_new_tokens")
        if self.temperature < 0:
            raise InvalidArgument(f"temperature: {self.temperature} is under 0", field="temperature")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InvalidArgument(f"top_p: {self.top_p} is not in (0, 1]", field="top_p")
        if self.top_k_tokens is not None and self.top_k_tokens < 1:
            raise InvalidArgument(f"top_k_tokens: {self.top_k_tokens} is under 1", field="top_k_tokens")
        if any(not text for text in self.stop):
            raise InvalidArgument("stop: an empty string would stop at once", field="stop")
        return self


@dataclass(kw_only=True)
class Continuation:
    """What one row got."""

    token_ids: list[int]
    text: str = ""
    # "end", "stop", "length" (max_new_tokens) or "context" (no room left).
    finish_reason: str = ""


def generate(
    decoder: MixtureDecoder,
    detokenizer: Detokenizer,
    options: GenerateOptions,
    *,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Continuation]:
    """Continues every context of `decoder`. `on_text(row, text)` is told of text as it comes, stop strings included."""
    count = len(decoder.contexts)
    results = [Continuation(token_ids=[]) for _ in range(count)]
    texts = [TextState()] * count
    generators = [_generator(options.seed, row) for row in range(count)] if options.temperature > 0 else None
    live = list(range(count))
    while live:
        chosen = choose(decoder.log_probs(), options, [generators[row] for row in live] if generators else None)
        decoder.push(chosen)
        for place, row in enumerate(live):
            result, token = results[row], chosen[place]
            if token in options.end_tokens:
                result.finish_reason = "end"
                continue
            result.token_ids.append(token)
            texts[row], piece = detokenizer.push(texts[row], token)
            if piece:
                result.text += piece
                if on_text is not None:
                    on_text(row, piece)
            result.finish_reason = _why_finished(result, options, length=len(decoder.contexts[place]))
        unfinished = [place for place, row in enumerate(live) if not results[row].finish_reason]
        if len(unfinished) < len(live):
            decoder.reorder(unfinished)
            live = [live[place] for place in unfinished]
    return results


def _why_finished(result: Continuation, options: GenerateOptions, *, length: int) -> str:
    starts = [at for text in options.stop if (at := result.text.find(text)) >= 0]
    if starts:
        result.text = result.text[: min(starts)]
        return "stop"
    if len(result.token_ids) >= options.max_new_tokens:
        return "length"
    return "context" if options.max_length is not None and length >= options.max_length else ""


def choose(
    log_probs_BV: torch.Tensor, options: GenerateOptions, generators: Sequence[torch.Generator] | None
) -> list[int]:
    """The next token of each row; greedy without `generators` (of equals, the lowest id)."""
    import torch

    if generators is None:
        return [int(i) for i in log_probs_BV.argmax(dim=-1).tolist()]
    # On the CPU, so that a seed gives the same draws whatever the device.
    scaled_BV = restrict(log_probs_BV.float().cpu() / options.temperature, options.top_k_tokens, options.top_p)
    probs_BV = torch.softmax(scaled_BV, dim=-1)
    return [
        int(torch.multinomial(probs_V, 1, generator=generator).item())
        for probs_V, generator in zip(probs_BV, generators, strict=True)
    ]


def restrict(log_probs_BV: torch.Tensor, top_k_tokens: int | None, top_p: float | None) -> torch.Tensor:
    """Scores with all but the `top_k_tokens` best, then all outside the nucleus of mass `top_p`, at -inf."""
    import torch

    if top_k_tokens is not None and top_k_tokens < log_probs_BV.shape[-1]:
        threshold = log_probs_BV.topk(top_k_tokens, dim=-1).values[:, -1:]
        log_probs_BV = log_probs_BV.masked_fill(log_probs_BV < threshold, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = log_probs_BV.sort(dim=-1, descending=True, stable=True)
        probs = ordered.softmax(dim=-1)
        # A token is kept while the mass before it is short of top_p; the best one always is.
        outside = probs.cumsum(dim=-1) - probs >= top_p
        log_probs_BV = log_probs_BV.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
    return log_probs_BV


def _generator(seed: int, row: int) -> torch.Generator:
    import torch

    digest = hashlib.sha256(f"{seed}/{row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
