"""Small ensembles for tests of the client library: random experts, a random router over real words, one tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cbtm_common.recipe import Recipe, RoutingRecipe
from cbtm_common.routing import CentroidRouter, LearnedRouter, TermEmbedding
from tests.support.models import EOS_TOKEN_ID, Architecture, make_tiny_model, make_tiny_tokenizer

WORDS = (
    "river stone window garden engine letter copper silver winter summer market village harbor mountain captain "
    "doctor music painting theorem number matrix vector kernel compile function variable court statute contract "
    "licence verse prophet sermon chapter naïve café größe 東京 данные"
).split()
VOCABULARY = 300


def random_texts(count: int, *, seed: int, words: tuple[int, int] = (1, 12)) -> list[str]:
    """Texts of known and unknown words, with punctuation and multi-byte characters."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        chosen = rng.choice([*WORDS, "xyzzy", "the", "qwerty", "🜁", "…"], size=int(rng.integers(*words)))
        texts.append(" ".join(chosen.tolist()) + str(rng.choice(["", ".", "\n", " "])))
    return texts


def random_router(cluster_ids: Sequence[str], *, seed: int = 0, temperature: float = 0.3) -> CentroidRouter:
    rng = np.random.default_rng(seed)
    terms = [word.lower() for word in WORDS]
    dimensions = 6
    centroids = rng.normal(size=(len(cluster_ids), dimensions))
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    prior = rng.uniform(0.5, 1.5, size=len(cluster_ids))
    return CentroidRouter(
        cluster_ids=cluster_ids,
        embedding=TermEmbedding(terms, rng.normal(size=(len(terms), dimensions)).astype(np.float32)),
        centroids=centroids.astype(np.float32),
        prior=(prior / prior.sum()).astype(np.float32),
        temperature=temperature,
    )


class PlainSource:
    """An expert that is a folder."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self._directory = directory

    def config_path(self) -> Path:
        return self._directory / "config.json"

    def directory(self) -> Path:
        return self._directory


def learned_router(clustering: CentroidRouter, *, seed: int = 0) -> LearnedRouter:
    """A learned router beside `clustering`, of random numbers."""
    random = np.random.default_rng((seed, 1))
    return LearnedRouter(
        clustering=clustering,
        vocabulary=WORDS,
        coefficients=random.normal(size=(len(WORDS), len(clustering.cluster_ids))).astype(np.float32),
        bias=random.normal(size=len(clustering.cluster_ids)).astype(np.float32),
        temperature=1.4,
    )


def make_parts(
    root: Path,
    *,
    experts: int = 3,
    missing: Iterable[int] = (),
    architecture: Architecture = "llama",
    context: int = 64,
    top_k: int = 2,
    seed: int = 0,
) -> Any:
    """`EnsembleParts` of random models under `root`; clusters `missing` have no expert."""
    from cbtm._parts import ClusterInfo, EnsembleParts

    ids = [f"run_x-c{index:04d}" for index in range(experts)]
    sources = {}
    for index, cluster_id in enumerate(ids):
        if index in set(missing):
            continue
        directory = make_tiny_model(
            root / f"model{index}",
            architecture=architecture,
            vocab_size=VOCABULARY,
            seed=100 * seed + index,
            hidden_size=16,
            layers=2,
            context=context,
        )
        sources[cluster_id] = PlainSource(f"expert {index}", directory)
    tokenizer = make_tiny_tokenizer(root / "tokenizer", [" ".join(WORDS[:12])] * 3, vocab_size=VOCABULARY)
    base = make_tiny_model(
        root / "seed", architecture=architecture, vocab_size=VOCABULARY, seed=99, hidden_size=16, context=context
    )
    return EnsembleParts(
        run_id="run_x",
        run_name="x",
        # Rows in another order than the clusters' indices: only ids bind them.
        router=random_router(ids[::-1], seed=seed),
        tokenizer_dir=tokenizer,
        clusters=tuple(ClusterInfo(id=c, index=i, top_terms=("word", c)) for i, c in enumerate(ids)),
        experts=sources,
        seed=PlainSource("seed", base),
        recipe=Recipe(sequence_length=32, routing=RoutingRecipe(temperature=0.3, top_k=top_k)),
    )


def brute_force_log_probs(model: Any, ids: Sequence[int], *, top_k: int | None) -> np.ndarray[Any, Any]:
    """log p(next | ids) by the definition: decode the whole context, embed it afresh, mix full softmaxes. [V]

    Shares nothing with the library but the router's `weights` of one text and the experts' own forward passes.
    """
    import torch
    from transformers import AutoModelForCausalLM

    cluster_ids = [c.id for c in model.clusters]
    router = model.parts.router
    text = model.tokenizer.decode([i for i in ids if i != EOS_TOKEN_ID], clean_up_tokenization_spaces=False)
    all_weights = router.weights([text], temperature=model.routing.temperature)[0]
    weights = {c: float(all_weights[router.cluster_ids.index(c)]) for c in cluster_ids}
    kept = sorted(cluster_ids, key=lambda c: -weights[c])[: top_k or len(cluster_ids)]
    total = sum(weights[c] for c in kept)
    mixed = 0.0
    for cluster_id in kept:
        directory = model.parts.experts[cluster_id].directory()
        if directory not in _LOADED:
            _LOADED[directory] = AutoModelForCausalLM.from_pretrained(directory).eval()
        with torch.inference_mode():
            logits = _LOADED[directory](input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]
        mixed = mixed + weights[cluster_id] / total * torch.softmax(logits.double(), dim=-1).numpy()
    result: np.ndarray[Any, Any] = np.log(mixed)
    return result


_LOADED: dict[Path, Any] = {}


def build(parts: Any, **options: Any) -> Any:
    """An ensemble of `parts`; `options` as of its constructors."""
    import torch

    from cbtm._ensemble import Ensemble
    from cbtm._residency import Placement

    torch.set_num_threads(1)
    placement = Placement(**{k: v for k, v in options.items() if k in ("max_experts", "max_bytes", "dtype", "device")})
    return Ensemble._of(parts, placement, top_k=options.get("top_k"), temperature=options.get("temperature"))


def greedy_by_brute_force(model: Any, prompt: str, *, top_k: int | None, tokens: int) -> list[int]:
    ids = [EOS_TOKEN_ID, *model.encode(prompt)]
    added: list[int] = []
    while len(added) < tokens and len(ids) < model.pool.context:
        token = int(brute_force_log_probs(model, ids, top_k=top_k).argmax())
        if token == EOS_TOKEN_ID:
            break
        added.append(token)
        ids.append(token)
    return added
