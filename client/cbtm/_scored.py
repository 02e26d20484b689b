"""What each model says of held-out documents, read once; every mixture of the experts is arithmetic on that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cbtm._held_out import HeldOutDocument
from cbtm._residency import ExpertPool, ExpertSource, check_dtype, load_model
from cbtm._scoring import TokenSequence, model_scores
from cbtm_common.errors import InvalidArgument

if TYPE_CHECKING:
    from cbtm._ensemble import Ensemble

Float64 = npt.NDArray[np.float64]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class ScoredDocuments:
    """Documents, and the log-probability of each of their tokens: by expert, document and token; of others likewise.

    `others` are "seed" and "dense", where there is one. Experts are in the order of the ensemble's clusters.
    """

    documents: tuple[HeldOutDocument, ...]
    sequences: tuple[TokenSequence, ...]
    experts: tuple[tuple[Float64, ...], ...]
    others: dict[str, tuple[Float64, ...]]
    window: int
    stride: int

    @property
    def tokens(self) -> int:
        return sum(sequence.scored for sequence in self.sequences)

    def of_experts(self, number: int) -> Float64:
        """[T, K]: of the document of this number."""
        return np.stack([scores[number] for scores in self.experts], axis=1)


def score_documents(
    model: Ensemble,
    documents: Sequence[HeldOutDocument] | Sequence[str],
    *,
    seed: bool = True,
    baseline: Ensemble | None = None,
    progress: Progress | None = None,
) -> ScoredDocuments:
    """Runs every expert, the seed (if asked for and there) and the dense `baseline` over all documents, one by one.

    A text belongs to the cluster that the router finds nearest to the whole of it, as in sharding. `progress(name,
    done, total)` is told of tokens read by each model. Holds one float for each token and model. Raises InvalidArgument
    without a token to score.
    """
    held_out = [d if isinstance(d, HeldOutDocument) else _assigned(model, d) for d in documents]
    held_out = [d for d in held_out if d.token_ids]
    if not held_out:
        raise InvalidArgument("documents: there is no token to score", field="documents")
    if baseline is not None:
        check_baseline(model, baseline)
    sequences = tuple(model.sequence_of(d.token_ids) for d in held_out)
    window, stride = model.window_and_stride()
    scorer = _Scorer(sequences, window, stride, progress)
    experts = tuple(scorer.expert(model.pool, expert) for expert in range(len(model.clusters)))
    others = {}
    if seed and model.parts.seed is not None:
        others["seed"] = scorer.source("seed", model.parts.seed, model.pool)
    if baseline is not None:
        others["dense"] = scorer.expert(baseline.pool, 0, name="dense")
    return ScoredDocuments(
        documents=tuple(held_out),
        sequences=sequences,
        experts=experts,
        others=others,
        window=window,
        stride=stride,
    )


def log_mixtures(weights_TK: Float64, log_probs_TK: npt.NDArray[np.floating]) -> Float64:
    """log Σ w · p of the k heaviest, renormalised, for every k at once: [T, K], column k - 1 for the top k.

    Of equal weights the lower index is heavier, as in `keep_top`.
    """
    order_TK = np.argsort(-weights_TK, axis=1, kind="stable")
    heaviest_TK = np.take_along_axis(weights_TK, order_TK, axis=1)
    with np.errstate(divide="ignore"):
        shares_TK = np.log(heaviest_TK) + np.take_along_axis(log_probs_TK, order_TK, axis=1)
    mixed: Float64 = np.logaddexp.accumulate(shares_TK, axis=1) - np.log(np.cumsum(heaviest_TK, axis=1))
    return mixed


def check_baseline(model: Ensemble, baseline: Ensemble) -> None:
    """Raises InvalidArgument when the two cannot be compared token by token."""
    if len(baseline.pool) != 1 or baseline.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise InvalidArgument("baseline: it is not one dense model with the same tokenizer", field="baseline")


class _Scorer:
    """Runs one model at a time over the same sequences."""

    def __init__(self, sequences: Sequence[TokenSequence], window: int, stride: int, progress: Progress | None) -> None:
        self._sequences = sequences
        self._window = window
        self._stride = stride
        self._progress = progress
        self._total = sum(sequence.scored for sequence in sequences)

    def expert(self, pool: ExpertPool, index: int, *, name: str | None = None) -> tuple[Float64, ...]:
        return self._run(name or pool.sources[index].name, pool.get(index))

    def source(self, name: str, source: ExpertSource, pool: ExpertPool) -> tuple[Float64, ...]:
        dtype = check_dtype(pool.placement.dtype)
        return self._run(name, load_model(source.directory(), name=name, device=pool.device, dtype=dtype))

    def _run(self, name: str, model: Any) -> tuple[Float64, ...]:
        done = 0

        def told(tokens: int) -> None:
            nonlocal done
            done = min(done + tokens, self._total)
            if self._progress is not None:
                self._progress(name, done, self._total)

        return tuple(model_scores(model, self._sequences, window=self._window, stride=self._stride, progress=told))


def _assigned(model: Ensemble, text: str) -> HeldOutDocument:
    router = model.parts.router
    return HeldOutDocument(
        token_ids=tuple(model.encode(text)), cluster_id=router.cluster_ids[int(router.assign([text])[0])]
    )
