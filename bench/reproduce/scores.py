"""What every model says of every held-out token, computed once and kept: all mixtures are arithmetic on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cbtm._catalog import Catalog
from cbtm._ensemble import Ensemble
from cbtm._held_out import HeldOutDocument
from cbtm._merge import average
from cbtm._residency import load_model
from cbtm._scoring import TokenSequence, model_scores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Held-out documents, each from its beginning, after an end-of-text token that is not scored.

    Values of all tokens lie one document after the other, `bounds[d]` to `bounds[d + 1]`. Choices are made on the first
    `validation` documents, and the others are reported.
    """

    sequences: tuple[TokenSequence, ...]
    bounds: npt.NDArray[np.int64]
    validation: int

    @classmethod
    def of(
        cls, target: str, run: str, token: str, cache: Path, *, beside: str, limits: tuple[int, int], tokens: int
    ) -> Documents:
        """Of the run's at most so many of each split, evenly over its clusters, and so many tokens of each.

        `beside` is a complete run with the same tokenizer.
        """
        with Catalog(target, run=run, token=token, cache_dir=cache) as catalog:
            validation = _evenly(catalog.held_out(split="validation"), limits[0])
            test = _evenly(catalog.held_out(split="test"), limits[1])
        with Ensemble.from_coordinator(target, run=beside, token=token, cache_dir=cache) as model:
            sequences = [model.sequence_of(d.token_ids[:tokens]) for d in (*validation, *test)]
        bounds = np.cumsum([0, *(sequence.scored for sequence in sequences)])
        return cls(sequences=tuple(sequences), bounds=bounds, validation=len(validation))

    @property
    def split(self) -> int:
        """Where the values of the test documents begin."""
        return int(self.bounds[self.validation])

    def __len__(self) -> int:
        return len(self.sequences)


def _evenly(documents: Sequence[HeldOutDocument], limit: int) -> list[HeldOutDocument]:
    count = len(documents)
    return [documents[i * count // limit] for i in range(limit)] if count > limit else list(documents)


class Scores:
    """Log-probabilities, float32 [tokens], by name, in files of `folder`."""

    def __init__(self, folder: Path, documents: Documents, *, window: int) -> None:
        self._folder = folder
        self._documents = documents
        self._window = window
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, load: Callable[[], PreTrainedModel]) -> Float32:
        """What the model says; read from disk if it has been asked before."""
        path = self._folder / f"{name}.npy"
        if not path.exists():
            said = model_scores(load(), self._documents.sequences, window=self._window, stride=self._window // 2)
            values = np.concatenate(said).astype(np.float32)
            unfinished = path.with_suffix(".part.npy")
            np.save(unfinished, values)
            unfinished.rename(path)
        found: Float32 = np.load(path)
        return found


@dataclass(frozen=True, kw_only=True)
class RunScores:
    """Of one run: experts [K, tokens] in the order of the router's clusters; the seed, the experts' mean [tokens]."""

    experts: Float32
    seed: Float32
    mean: Float32 | None


class Reader:
    """Opens runs of one coordinator, and scores their models."""

    def __init__(self, target: str, token: str, cache: Path, *, device: str) -> None:
        self._common: dict[str, Any] = {"token": token, "cache_dir": cache, "device": device}
        self._target = target
        self._device = device
        self._cache = cache

    def open(self, run: str) -> Ensemble:
        """Experts are used one at a time."""
        return Ensemble.from_coordinator(self._target, run=run, max_experts=1, **self._common)

    def seed_dir(self, run: str) -> Path:
        with self.open(run) as model:
            assert model.parts.seed is not None, "every run has a seed once it trains"
            return model.parts.seed.directory()

    def tokenizer_dir(self, run: str) -> Path:
        with self.open(run) as model:
            return model.parts.tokenizer_dir

    def dense(self, run: str, scores: Scores) -> Float32:
        """Of a run of one model."""
        with self.open(run) as model:
            return scores.get(run, lambda: model.pool.get(0))

    def experts(self, runs: Sequence[str], scores: Scores) -> RunScores:
        """Of one run's experts, or of the single experts of several runs with the same seed."""
        with ExitStack() as stack:
            models = [stack.enter_context(self.open(run)) for run in runs]
            directories: list[Path] = []
            rows: list[Float32] = []
            for run, model in zip(runs, models, strict=True):
                for index, source in enumerate(model.pool.sources):
                    rows.append(scores.get(f"{run}-{index}", partial(model.pool.get, index)))
                    directories.append(source.directory())
            seed = models[0].parts.seed
            assert seed is not None
            base = scores.get(f"{runs[0]}-seed", lambda: self._load("seed", seed.directory()))
            mean = scores.get(f"{runs[0]}-mean", lambda: self._mean(runs[0], directories)) if len(rows) > 1 else None
        return RunScores(experts=np.stack(rows), seed=base, mean=mean)

    def _mean(self, run: str, directories: Sequence[Path]) -> PreTrainedModel:
        output = self._cache / "means" / run
        if not output.exists():
            unfinished = output.with_name(f"{run}.part")
            shutil.rmtree(unfinished, ignore_errors=True)
            average(directories, unfinished)
            unfinished.rename(output)
        return self._load("mean", output)

    def _load(self, name: str, directory: Path) -> PreTrainedModel:
        import torch

        return load_model(directory, name=name, device=torch.device(self._device), dtype=torch.float32)
