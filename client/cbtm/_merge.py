"""Collapses an ensemble's experts into one ordinary model.

- `average`: every parameter is the (weighted) mean over the experts. The paper's ablation; a domain-weighted average
  when the weights come from routing a text. Works for every architecture, since all experts share one.
- `mixture_of_experts`: a Branch-Train-MiX checkpoint (BTX, arXiv 2403.07816, section 3.2): feed-forward layers become
  experts, all other parameters are averaged, in an architecture that `transformers` already has, so that plain
  `from_pretrained` loads it. The gate of each layer starts from what the feed-forward layers see on each cluster's own
  text: row c is the mean hidden state of cluster c less the mean over clusters. BTX trains on after this; a merged
  model is a start for that, and is not promised to equal the ensemble.

| experts' `model_type` | mixture written as | condition |
| --- | --- | --- |
| llama, mistral | MixtralForCausalLM | no biases |
| qwen3 | Qwen3MoeForCausalLM | no biases |

`merge` does both from an ensemble. The result is held in memory until it is written; of the experts, one tensor each at
a time. The gate runs the averaged model.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from cbtm._folder import tokenizer_files
from cbtm._weights import TensorDirectory
from cbtm_common.errors import AlreadyExists, InvalidArgument

if TYPE_CHECKING:
    import torch

    from cbtm._ensemble import Ensemble

# From these safetensors fit one file; a larger model is sharded, as transformers does it.
_MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, kw_only=True)
class _MoeFamily:
    """How a dense architecture's checkpoint maps to its mixture-of-experts sibling."""

    model_type: str
    config_class: str
    mlp: str
    # Dense feed-forward parameter -> the expert's, within a layer's block.
    expert_names: Mapping[str, str]
    gate: str


_MIXTRAL = _MoeFamily(
    model_type="mixtral",
    config_class="MixtralConfig",
    mlp="block_sparse_moe",
    expert_names={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    gate="block_sparse_moe.gate.weight",
)
_QWEN3_MOE = _MoeFamily(
    model_type="qwen3_moe",
    config_class="Qwen3MoeConfig",
    mlp="mlp",
    expert_names={"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"},
    gate="mlp.gate.weight",
)
MOE_FAMILIES: Mapping[str, _MoeFamily] = {"llama": _MIXTRAL, "mistral": _MIXTRAL, "qwen3": _QWEN3_MOE}


class MergeMethod(StrEnum):
    AVERAGE = "average"
    # Average, with the weights of a text.
    WEIGHTED = "weighted"
    MOE = "moe"


def merge(
    model: Ensemble,
    output: str | os.PathLike[str],
    *,
    method: MergeMethod | Literal["average", "weighted", "moe"],
    texts: Sequence[str] = (),
    top_k: int | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> None:
    """Writes one ordinary model of `model`'s experts, with their tokenizer, to the new folder `output`.

    `texts`: for "weighted", those to be good at, each with its routing weights at the ensemble's own top k (the mean
    is taken); for "moe", some of every cluster's kind, each going to the cluster that the router finds nearest. `top_k`
    is "moe"'s number of experts for each token; default the ensemble's. `report` is told of each step.

    Raises InvalidArgument for an architecture that the method does not work for, and for a cluster without a text;
    AlreadyExists when something is at `output`.
    """
    try:
        chosen = MergeMethod(method)
    except ValueError:
        raise InvalidArgument(f"method: {method!r} is not one of {', '.join(MergeMethod)}", field="method") from None
    given = [text for text in texts if text.strip()]
    if (chosen is MergeMethod.AVERAGE) == bool(given):
        raise InvalidArgument(
            "texts: method 'average' takes none" if given else f"texts: method '{chosen}' needs some", field="texts"
        )
    if top_k is not None and chosen is not MergeMethod.MOE:
        raise InvalidArgument(f"top_k: it goes with method 'moe', not '{chosen}'", field="top_k")
    target = Path(output)
    if target.exists():
        raise AlreadyExists(f"{target} exists; choose another folder")
    report("fetching experts")
    experts = [source.directory() for source in model.pool.sources]
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        if chosen is MergeMethod.MOE:
            mixture_of_experts(
                experts,
                building,
                tokenizer=model.parts.tokenizer_dir,
                cluster_texts=_by_cluster(model, given),
                top_k=top_k or model.routing.top_k or len(experts),
                report=report,
            )
        else:
            report("averaging")
            of_experts = model.context_router.with_options({"seed_below": "never"})
            weights = of_experts.text_weights(given).mean(axis=0).tolist() if given else None
            average(experts, building, weights=weights)
        for file in tokenizer_files(model.parts.tokenizer_dir):
            shutil.copyfile(file, building / file.name)
        building.rename(target)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _by_cluster(model: Ensemble, texts: Sequence[str]) -> list[list[str]]:
    nearest = model.context_router.router.assign(texts).tolist()
    found: list[list[str]] = [[] for _ in model.clusters]
    for text, cluster in zip(texts, nearest, strict=True):
        found[cluster].append(text)
    return found


def average(experts: Sequence[Path], output: Path, *, weights: Sequence[float] | None = None) -> None:
    """Writes the weighted mean of `experts` (model directories) to `output`; equal weights when None.

    `weights` need not sum to 1; they are normalised. Means are taken in float32 and stored in the experts' dtype.
    Raises InvalidArgument when the experts' tensors differ in name or shape.
    """
    shares = _shares(len(experts), weights)
    sources = [TensorDirectory(path) for path in experts]
    _check_alike(sources)
    _write(output, {name: _mean(sources, name, shares) for name in sources[0]})
    _copy_plain_files(experts[0], output)


def mixture_of_experts(
    experts: Sequence[Path],
    output: Path,
    *,
    tokenizer: Path,
    cluster_texts: Sequence[Sequence[str]],
    top_k: int = 2,
    report: Callable[[str], None] = lambda _: None,
) -> None:
    """Writes a mixture-of-experts model of `experts` to `output`.

    `cluster_texts[i]` are texts of expert i's cluster, from which its gate rows are made; at least one each.
    `top_k` experts are used for each token. Raises InvalidArgument for an architecture outside the table above.
    """
    config = json.loads((experts[0] / "config.json").read_text("utf-8"))
    family = _family(config)
    if not 1 <= top_k <= len(experts):
        raise InvalidArgument(f"top_k: {top_k} is not between 1 and the {len(experts)} experts", field="top_k")
    missing = [i for i, texts in enumerate(cluster_texts) if not texts]
    if missing or len(cluster_texts) != len(experts):
        raise InvalidArgument(
            f"cluster_texts: no text routes to expert(s) {missing}; give more texts, of every cluster's kind",
            field="cluster_texts",
        )
    sources = [TensorDirectory(path) for path in experts]
    _check_alike(sources)
    shares = _shares(len(experts), None)
    report("averaging attention, embeddings and norms")
    with TemporaryDirectory() as scratch:
        averaged = Path(scratch) / "average"
        average(experts, averaged, weights=None)
        report("measuring what each layer's gate sees on each cluster")
        gates = _gates(averaged, tokenizer, cluster_texts)
    tensors: dict[str, torch.Tensor] = {}
    for name in sources[0]:
        layer, kind = _feed_forward(name)
        if layer is None:
            tensors[name] = _mean(sources, name, shares)
            continue
        for index, source in enumerate(sources):
            target = f"model.layers.{layer}.{family.mlp}.experts.{index}.{family.expert_names[kind]}.weight"
            tensors[target] = source[name].clone()
    for layer, gate_KD in enumerate(gates):
        dtype = sources[0][f"model.layers.{layer}.mlp.gate_proj.weight"].dtype
        tensors[f"model.layers.{layer}.{family.gate}"] = gate_KD.to(dtype)
    _write(output, tensors)
    _copy_plain_files(experts[0], output)
    _moe_config(config, family, experts=len(experts), top_k=top_k).save_pretrained(output)


def _family(config: Mapping[str, Any]) -> _MoeFamily:
    kind = config.get("model_type")
    family = MOE_FAMILIES.get(str(kind))
    if family is None:
        raise InvalidArgument(
            f"method moe: an expert of model_type {kind!r} has no mixture sibling in transformers; "
            f"it works for {', '.join(sorted(MOE_FAMILIES))}. Use method average or weighted, or keep the ensemble.",
            field="method",
        )
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise InvalidArgument(
            "method moe: these experts have biases, for which the mixture has no place; use method average",
            field="method",
        )
    return family


def _moe_config(config: Mapping[str, Any], family: _MoeFamily, *, experts: int, top_k: int) -> Any:
    import transformers

    fields = {k: v for k, v in config.items() if k not in ("model_type", "architectures", "transformers_version")}
    if family is _QWEN3_MOE:
        fields |= {"num_experts": experts, "moe_intermediate_size": fields["intermediate_size"], "norm_topk_prob": True}
    else:
        fields |= {"num_local_experts": experts}
    config_class = getattr(transformers, family.config_class)
    architecture = family.config_class.replace("Config", "ForCausalLM")
    return config_class(**fields, num_experts_per_tok=top_k, architectures=[architecture])


def _feed_forward(name: str) -> tuple[int | None, str]:
    """(layer, "gate_proj"|"up_proj"|"down_proj") of a feed-forward weight, or (None, "")."""
    parts = name.split(".")
    if len(parts) == 6 and parts[:2] == ["model", "layers"] and parts[3] == "mlp" and parts[5] == "weight":
        return int(parts[2]), parts[4]
    return None, ""


def _gates(model_dir: Path, tokenizer_dir: Path, cluster_texts: Sequence[Sequence[str]]) -> list[torch.Tensor]:
    """For each layer a gate [K, D]: unit directions from the overall mean input to each cluster's, times sqrt(D).

    Inputs are RMS-normalised, of norm near sqrt(D), so the logits of two clusters differ by a few units: a choice, not
    a tie and not a certainty.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.train(False)
    context = int(model.config.max_position_embeddings)
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]

    def watch(layer: int) -> Any:
        def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            seen[layer].append(inputs[0].reshape(-1, inputs[0].shape[-1]).mean(0))

        return hook

    handles = [block.mlp.register_forward_pre_hook(watch(i)) for i, block in enumerate(model.model.layers)]
    means: list[list[torch.Tensor]] = [[] for _ in handles]
    with torch.no_grad():
        for texts in cluster_texts:
            for text in texts:
                ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:context]
                model(input_ids=torch.tensor([ids]), use_cache=False)
            for layer, values in enumerate(seen):
                means[layer].append(torch.stack(values).mean(0))
                values.clear()
    for handle in handles:
        handle.remove()
    gates = []
    for rows in means:
        mean_KD = torch.stack(rows)
        offset_KD = mean_KD - mean_KD.mean(0)
        gates.append(torch.nn.functional.normalize(offset_KD, dim=-1) * mean_KD.shape[-1] ** 0.5)
    return gates


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    if count == 0:
        raise InvalidArgument("experts: none given", field="experts")
    if weights is None:
        return [1.0 / count] * count
    if len(weights) != count or min(weights) < 0 or sum(weights) <= 0:
        raise InvalidArgument(
            f"weights: {list(weights)} must be {count} numbers, none negative and not all zero", field="weights"
        )
    return [w / sum(weights) for w in weights]


def _check_alike(sources: Sequence[TensorDirectory]) -> None:
    first = sources[0]
    names = set(first)
    for other in sources[1:]:
        difference = names ^ set(other)
        if difference:
            raise InvalidArgument(
                f"{other.directory} and {first.directory} differ in tensors: {sorted(difference)[:3]}"
            )
        for name in names:
            if other.shape(name) != first.shape(name):
                raise InvalidArgument(
                    f"{other.directory}: {name} has shape {other.shape(name)}, in {first.directory} {first.shape(name)}"
                )


def _mean(sources: Sequence[TensorDirectory], name: str, shares: Sequence[float]) -> torch.Tensor:
    first = sources[0][name]
    total = first.float() * shares[0]
    for source, share in zip(sources[1:], shares[1:], strict=True):
        if share > 0:
            total += source[name].float() * share
    return total.to(first.dtype)


def _write(output: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Saves `tensors` as transformers would: one file, or shards and an index."""
    from huggingface_hub import save_torch_state_dict

    output.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(tensors, output, max_shard_size=_MAX_SHARD_BYTES, metadata={"format": "pt"})


def _copy_plain_files(source: Path, output: Path) -> None:
    for path in source.iterdir():
        if path.suffix == ".json" and not path.name.endswith(".index.json"):
            shutil.copyfile(path, output / path.name)
