"""One expert's keys and values for the rows of a batch that use it, now or before.

Rows in use together are one batch, which the expert reads in one forward pass a step, whether a row has one new token
or is catching up on many: shorter ones are padded at the left. A row that is not in use is set aside, without padding,
for when it comes back. Only architectures whose cache is keys and values (not recurrent states) are taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cbtm_common.errors import InvalidArgument

if TYPE_CHECKING:
    import torch
    from transformers import DynamicCache, PreTrainedModel

    # Keys and values [H, T, D] of one row, for each layer.
    _RowCache = tuple[tuple[torch.Tensor, torch.Tensor], ...]

# Padding is cheaper than another pass up to so many tokens, or to as many as are real.
_PADDING = 256


class ExpertCache:
    """Keys and values by row."""

    def __init__(self) -> None:
        self._active: DynamicCache | None = None
        # Row -> its tokens in `_active`, in the order of its batch dimension.
        self._lengths: dict[int, int] = {}
        # Which places of `_active` hold a token, [R, T]; None: all.
        self._valid_RT: torch.Tensor | None = None
        self._aside: dict[int, _RowCache] = {}

    def seen(self, row: int) -> int:
        """How many of the row's tokens this expert has read."""
        if row in self._lengths:
            return self._lengths[row]
        return int(self._aside[row][0][0].shape[1]) if row in self._aside else 0

    def advance(self, model: PreTrainedModel, contexts: Mapping[int, Sequence[int]], *, keep: int = 1) -> torch.Tensor:
        """Logits after each of the last `keep` tokens of each context, [R, keep, V], in the order of `contexts`.

        Reads the tokens not yet seen; each context has at least one. What stands before a context's unseen tokens,
        where they are fewer than `keep`, means nothing.
        """
        import torch

        unseen = {row: list(ids[self.seen(row) :]) for row, ids in contexts.items()}
        groups = _groups({row: len(ids) for row, ids in unseen.items()})
        logits: dict[int, torch.Tensor] = {}
        for group in groups:
            if group != list(self._lengths):
                self._set_aside()
                self._take_up(group)
            output_RMV = self._forward(model, {row: unseen[row] for row in group}, keep)
            if len(groups) == 1:
                return output_RMV
            logits.update(zip(group, output_RMV, strict=True))
        return torch.stack([logits[row] for row in contexts])

    def reorder(self, rows: Sequence[int]) -> None:
        """Row i becomes what row `rows[i]` was."""
        import torch

        if list(rows) == list(self._lengths) and not self._aside:
            return
        self._aside = {new: self._aside[old] for new, old in enumerate(rows) if old in self._aside}
        place = {row: i for i, row in enumerate(self._lengths)}
        kept = [(new, old) for new, old in enumerate(rows) if old in place]
        if self._active is not None and kept:
            keys, _ = self._keys_and_values()[0]
            chosen_R = torch.tensor([place[old] for _, old in kept], device=keys.device)
            self._active.batch_select_indices(chosen_R)
            self._valid_RT = None if self._valid_RT is None else self._valid_RT[chosen_R]
        elif not kept:
            self._active = self._valid_RT = None
        self._lengths = {new: self._lengths[old] for new, old in kept}

    def crop(self, lengths: Sequence[int]) -> None:
        """Forgets what row i has beyond `lengths[i]` tokens."""
        self._set_aside()
        for row, layers in list(self._aside.items()):
            if self.seen(row) > lengths[row]:
                self._aside[row] = tuple((k[:, : lengths[row]], v[:, : lengths[row]]) for k, v in layers)

    def _forward(self, model: PreTrainedModel, unseen: Mapping[int, list[int]], keep: int) -> torch.Tensor:
        import torch
        from transformers import DynamicCache

        device = model.device
        past = self._active.get_seq_length() if self._active is not None else 0
        seen = [self._lengths.get(row, 0) for row in unseen]
        news = list(map(len, unseen.values()))
        width = max(keep, *news)
        input_ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in unseen.values()], device=device)
        valid_RT = self._valid_RT
        if valid_RT is not None or any(new < width for new in news) or any(length < past for length in seen):
            if valid_RT is None:
                valid_RT = torch.ones((len(news), past), dtype=torch.bool, device=device)
            places_1W = torch.arange(width, device=device)[None]
            offset_R1 = torch.tensor([[width - new] for new in news], device=device)
            valid_RT = torch.cat([valid_RT, places_1W >= offset_R1], dim=1)
        options: dict[str, Any] = {}
        if valid_RT is not None:
            options["attention_mask"] = valid_RT.long()
            seen_R1 = torch.tensor([[length] for length in seen], device=device)
            options["position_ids"] = (places_1W - offset_R1).clamp(min=0) + seen_R1
        if self._active is None:
            # Without the config: all layers keep all tokens, so that rows can be set aside and taken up whole.
            self._active = DynamicCache()
        with torch.inference_mode():
            output = model(
                input_ids=input_ids, past_key_values=self._active, use_cache=True, logits_to_keep=keep, **options
            )
        if type(output.past_key_values) is not DynamicCache:
            raise InvalidArgument(
                f"experts: {type(model).__name__} does not keep plain keys and values, which generation needs",
                field="experts",
            )
        self._active, self._valid_RT = output.past_key_values, valid_RT
        self._lengths = {row: length + new for row, length, new in zip(unseen, seen, news, strict=True)}
        logits_RMV: torch.Tensor = output.logits[:, -keep:]
        return logits_RMV

    def _set_aside(self) -> None:
        if self._active is not None:
            layers = self._keys_and_values()
            for place, row in enumerate(self._lengths):
                # Copied, so that a row does not keep the whole batch in memory.
                valid_T = None if self._valid_RT is None else self._valid_RT[place]
                self._aside[row] = tuple(
                    (keys[place].clone(), values[place].clone())
                    if valid_T is None
                    else (keys[place, :, valid_T], values[place, :, valid_T])
                    for keys, values in layers
                )
        self._active, self._lengths, self._valid_RT = None, {}, None

    def _keys_and_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of the active batch, [R, H, T, D], for each layer."""
        layers: list[Any] = [] if self._active is None else self._active.layers
        return [(layer.keys, layer.values) for layer in layers]

    def _take_up(self, rows: Sequence[int]) -> None:
        """Makes `rows` the batch, those that are new included."""
        import torch
        from transformers import DynamicCache

        taken = {row: self._aside.pop(row) for row in rows if row in self._aside}
        self._lengths = {row: int(taken[row][0][0].shape[1]) if row in taken else 0 for row in rows}
        total = max(self._lengths.values())
        if not taken:
            return
        example = next(iter(taken.values()))
        self._active = DynamicCache()
        for number, of_layer in enumerate(example):
            batch = []
            for part, like_HTD in enumerate(of_layer):
                H, _, D = like_HTD.shape
                whole_RHTD = like_HTD.new_zeros((len(rows), H, total, D))
                for place, row in enumerate(rows):
                    if row in taken:
                        whole_RHTD[place, :, total - self._lengths[row] :] = taken[row][number][part]
                batch.append(whole_RHTD)
            self._active.update(batch[0], batch[1], number)
        if any(length < total for length in self._lengths.values()):
            device = example[0][0].device
            padding_R1 = torch.tensor([[total - length] for length in self._lengths.values()], device=device)
            self._valid_RT = torch.arange(total, device=device)[None] >= padding_R1


def _groups(lags: Mapping[int, int]) -> list[list[int]]:
    """Rows that read together: all, unless most of what they would read is padding."""
    longest, real = max(lags.values()), sum(lags.values())
    if longest * len(lags) - real <= max(_PADDING, real):
        return [list(lags)]
    long = [row for row, lag in lags.items() if 2 * lag > longest]
    return [long, *_groups({row: lag for row, lag in lags.items() if 2 * lag <= longest})]
