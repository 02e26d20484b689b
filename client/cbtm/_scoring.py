"""Log-probabilities of given tokens under the mixture, at the cost of the experts that some token needs.

A sequence longer than the context is scored in windows that overlap: each window after the first scores the tokens
that the one before could not, and so every token sees at least `window - stride` tokens before it (or all there are).
Routing always sees the whole sequence so far, windows or not.

Each expert is loaded once in a call, runs on just the windows that use it, and no further into a window than the last
token that does. Results do not depend on batching beyond the rounding of the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cbtm._mixture import target_log_probs
from cbtm._residency import ExpertPool
from cbtm._routing import ContextRouter

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Float64 = npt.NDArray[np.float64]
# Bytes of float32 logits of one batch: what bounds memory in scoring.
_LOGIT_BYTES = 192 << 20
_MAX_ROWS = 64
# Jobs of one batch are at least this part of its longest.
_ALIKE = 0.75


@dataclass(frozen=True, kw_only=True)
class TokenSequence:
    """Token ids of which `ids[first:]` are scored, each given all before it. `first` is at least 1."""

    ids: tuple[int, ...]
    first: int = 1

    @property
    def scored(self) -> int:
        return len(self.ids) - self.first


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens `start..last` of a sequence are read, and those after them up to `last` from `begin` on are scored."""

    sequence: int
    start: int
    # Targets scored here: positions begin..last of the sequence, both included.
    begin: int
    last: int


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One expert's work in one window: read ids[start:last], score the targets at `positions`."""

    window: Window
    positions: npt.NDArray[np.int64]
    log_weights: Float64

    @property
    def length(self) -> int:
        return int(self.positions[-1]) - self.window.start


def windows(sequence: int, length: int, first: int, *, window: int, stride: int) -> Iterator[Window]:
    """Windows that together score positions first..length-1 of a sequence, each once, in order."""
    start, begin = 0, first
    while begin < length:
        last = min(start + window, length - 1)
        if last >= begin:
            yield Window(sequence=sequence, start=start, begin=begin, last=last)
            begin = last + 1
        start += stride


def mixture_scores(
    pool: ExpertPool,
    router: ContextRouter,
    sequences: Sequence[TokenSequence],
    *,
    window: int,
    stride: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[list[Float64], Float64]:
    """(log-probability of each scored token, by sequence; share of each of the router's columns over all of them [W]).

    `progress` is told of tokens read, each time a batch is done.
    """
    jobs: dict[int, list[_Job]] = {}
    share = np.zeros(router.columns)
    for number, sequence in enumerate(sequences):
        if sequence.scored == 0:
            continue
        weights_TK = router.positions(sequence.ids, sequence.first)
        share += weights_TK.sum(axis=0)
        for view in windows(number, len(sequence.ids), sequence.first, window=window, stride=stride):
            part_TK = weights_TK[view.begin - sequence.first : view.last + 1 - sequence.first]
            for expert in np.flatnonzero(part_TK.any(axis=0)).tolist():
                used = np.flatnonzero(part_TK[:, expert])
                jobs.setdefault(expert, []).append(
                    _Job(window=view, positions=used + view.begin, log_weights=np.log(part_TK[used, expert]))
                )
    results = [np.full(sequence.scored, -np.inf) for sequence in sequences]
    for expert in pool.order(list(jobs)):
        for job, log_probs in _run(pool.get(expert), sequences, jobs[expert], progress):
            into = results[job.window.sequence]
            at = job.positions - sequences[job.window.sequence].first
            into[at] = np.logaddexp(into[at], job.log_weights + log_probs)
    total = share.sum()
    return results, share / total if total > 0 else share


def model_scores(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    *,
    window: int,
    stride: int,
    progress: Callable[[int], None] | None = None,
) -> list[Float64]:
    """The same of one model, without routing."""
    results = [np.full(sequence.scored, -np.inf) for sequence in sequences]
    jobs = []
    for number, sequence in enumerate(sequences):
        for view in windows(number, len(sequence.ids), sequence.first, window=window, stride=stride):
            positions = np.arange(view.begin, view.last + 1)
            jobs.append(_Job(window=view, positions=positions, log_weights=np.zeros(len(positions))))
    for job, log_probs in _run(model, sequences, jobs, progress):
        results[job.window.sequence][job.positions - sequences[job.window.sequence].first] = log_probs
    return results


def _run(
    model: PreTrainedModel,
    sequences: Sequence[TokenSequence],
    jobs: Sequence[_Job],
    progress: Callable[[int], None] | None,
) -> Iterator[tuple[_Job, Float64]]:
    """Log-probabilities at each job's positions, batch by batch, jobs of like length together."""
    import torch

    vocabulary = int(model.config.get_text_config().vocab_size)
    for batch in _batches(sorted(jobs, key=lambda job: -job.length), vocabulary):
        width = batch[0].length
        rows = []
        for job in batch:
            start, end = job.window.start, int(job.positions[-1])
            rows.append([*sequences[job.window.sequence].ids[start:end], *[_filler(model)] * (width - end + start)])
        # Padding stands at the right, where nothing that counts can see it: no mask is needed.
        # Only where some row needs them are there logits.
        kept = np.unique(np.concatenate([job.positions - 1 - job.window.start for job in batch]))
        with torch.inference_mode():
            output = model(
                input_ids=torch.tensor(rows, device=model.device),
                use_cache=False,
                logits_to_keep=torch.from_numpy(kept).to(model.device),
            )
        for row, job in enumerate(batch):
            places = torch.from_numpy(np.searchsorted(kept, job.positions - 1 - job.window.start)).to(model.device)
            ids = sequences[job.window.sequence].ids
            targets = torch.tensor([ids[t] for t in job.positions.tolist()], device=model.device)
            yield job, _numpy(target_log_probs(output.logits[row, places], targets))
        if progress is not None:
            progress(sum(job.length for job in batch))


def _batches(jobs: Sequence[_Job], vocabulary: int) -> Iterator[list[_Job]]:
    """Cuts jobs, longest first, so that the logits of a batch stay within bounds (one row always passes).

    A job much shorter than the longest starts a batch of its own: padding would cost more than another pass.
    """
    batch: list[_Job] = []
    for job in jobs:
        rows = len(batch) + 1
        longest = batch[0].length if batch else job.length
        too_large = rows > _MAX_ROWS or rows * longest * vocabulary * 4 > _LOGIT_BYTES
        if batch and (too_large or job.length < _ALIKE * longest):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _filler(model: PreTrainedModel) -> int:
    """An id for padding that transformers does not take for a forgotten attention mask."""
    return 1 if model.config.get_text_config().pad_token_id == 0 else 0


def _numpy(values: torch.Tensor) -> Float64:
    result: Float64 = values.double().cpu().numpy()
    return result
