"""What `CbtmForCausalLM` keeps between calls, in the form that transformers' generation asks of a cache."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache

from cbtm._decoder import MixtureDecoder
from cbtm._forward import TokenBatch, gathered
from cbtm._residency import ExpertPool
from cbtm._routing import ContextRouter
from cbtm_common.errors import InvalidArgument


class MixtureCache(Cache):
    """`past_key_values` of an ensemble: the contexts so far, with keys and values for each expert that read them."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self._decoder: MixtureDecoder | None = None
        self._pool: ExpertPool | None = None
        # Columns of input_ids read so far, padding included.
        self.columns = 0

    @property
    def begins(self) -> bool:
        """Whether it has read nothing yet."""
        return self._decoder is None

    def begin(self, pool: ExpertPool, router: ContextRouter, rows: int) -> None:
        """Experts and routing from here on, whatever becomes of the model."""
        self._pool = pool
        self._decoder = MixtureDecoder(pool, router, [[] for _ in range(rows)])

    def read(self, rows: list[list[int]], *, keep: int, columns: int) -> torch.Tensor:
        """More tokens for each row; log-probabilities after each of the last `keep`, [B, keep, V]."""
        assert self._decoder is not None, "begin comes first"
        self.columns += columns
        return self._decoder.extend(rows, keep)

    def read_batch(self, batch: TokenBatch, columns_C: torch.Tensor) -> torch.Tensor:
        """More columns for each row; log-probabilities after each of `columns_C` of them, [B, C, V]."""
        after_BC = batch.after(columns_C)
        # Counted from the last token, of which all rows have one.
        back_BC = torch.tensor([len(row) for row in batch.rows]).unsqueeze(-1) - 1 - after_BC
        keep = int(back_BC[after_BC >= 0].max()) + 1 if bool((after_BC >= 0).any()) else 1
        log_probs_BMV = self.read(batch.rows, keep=keep, columns=batch.columns)
        at_BC = torch.arange(len(batch.rows)).unsqueeze(-1) * keep + keep - 1 - back_BC
        return gathered(log_probs_BMV.flatten(0, 1), at_BC, after_BC)

    @property
    def pool(self) -> ExpertPool:
        assert self._pool is not None, "begin comes first"
        return self._pool

    @property
    def router(self) -> ContextRouter:
        assert self._decoder is not None, "begin comes first"
        return self._decoder.router

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row so far; empty before the first."""
        return [] if self._decoder is None else [len(ids) for ids in self._decoder.contexts]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self._decoder is not None:
            self._decoder.reorder([int(i) for i in beam_idx.tolist()])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes `-tokens_to_remove` tokens off the end of every row, as transformers' caches do."""
        tokens = -int(tokens_to_remove)
        if tokens < 0:
            raise InvalidArgument(f"tokens_to_remove: {-tokens} is above 0", field="tokens_to_remove")
        if tokens > 0 and self._decoder is not None:
            self._decoder.crop(tokens)
            self.columns -= tokens

    def activate_past_recording(self) -> None:
        """Nothing to do: every position can be cropped to."""

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_initialized(self) -> bool:
        return True
