"""An ensemble in one folder, to copy, publish and load with no coordinator.

    cbtm.json            format, run, recipe, calibrated routing; clusters and their experts by id; length and SHA-256
                         of every file
    config.json          model_type "cbtm", for `transformers`: what the experts have in common, how they are mixed
    modeling_cbtm.py     for programs that do not `import cbtm`: names its classes, to load with trust_remote_code=True
    tokenizer.json, …    the tokenizer
    router/              router.json, router.safetensors
    experts/0000/, …     plain Hugging Face directories: each loads alone with AutoModelForCausalLM
    seed/                the model that the experts branched from, likewise

Files are checked against cbtm.json when they are first used; a folder whose cbtm.json names no digests (written by
hand) is taken as it is. Saving is atomic: the folder appears whole or not at all.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cbtm._parts import ClusterInfo, EnsembleParts
from cbtm._routing import Policy, RoutingOptions
from cbtm_common import strict_json
from cbtm_common.errors import AlreadyExists, IntegrityError, InvalidArgument, NotFound
from cbtm_common.files import check_relative, describe, hash_file, safe_join
from cbtm_common.recipe import Recipe
from cbtm_common.routing import Distance, load_router
from cbtm_common.run_routing import RunRouting

FORMAT = "cbtm-ensemble-1"
MANIFEST = "cbtm.json"
MODEL_TYPE = "cbtm"


@dataclass(kw_only=True, eq=False)
class FolderSource:
    """A model directory within a saved ensemble; its files are hashed once, when first asked for."""

    name: str
    root: Path
    relative: str
    # Relative path -> (size, sha256), of the whole ensemble.
    digests: Mapping[str, tuple[int, str]]
    _checked: bool = field(default=False)

    def config_path(self) -> Path:
        return _within(self.root, f"{self.relative}/config.json")

    def directory(self) -> Path:
        path = _within(self.root, self.relative)
        if not path.is_dir():
            raise IntegrityError(f"{self.name}: {path} is missing; copy the whole ensemble folder")
        if not self._checked:
            _verify(self.root, self.relative + "/", self.digests, name=self.name)
            self._checked = True
        return path


def load_parts(path: Path) -> EnsembleParts:
    """The ensemble saved in `path`. Raises NotFound, IntegrityError or InvalidArgument."""
    manifest_path = path / MANIFEST
    try:
        manifest = strict_json.loads(manifest_path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"{path} is no saved ensemble: it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{manifest_path} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InvalidArgument(f"{manifest_path}: its format is not {FORMAT}; a newer cbtm may be needed", field="path")
    try:
        return _parts(path, manifest)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise IntegrityError(f"{manifest_path} is damaged: {error!r}") from error


def load_routing(path: Path) -> RoutingOptions | None:
    """How the ensemble saved in `path` is mixed; None where its config.json does not say. Raises IntegrityError."""
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
        weights = config.get("routing_weights")
        return RoutingOptions(
            top_k=config["num_experts_per_tok"],
            temperature=float(config["routing_temperature"]),
            distance=Distance(config["routing_distance"]),
            policy=Policy(config["routing_policy"]),
            weights=None if weights is None else tuple(weights),
            interval=int(config.get("routing_interval", 1)),
            settle_after=config.get("routing_settle_after"),
            seed_below=config.get("routing_seed_below"),
        )
    except (FileNotFoundError, KeyError):
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path / 'config.json'} is damaged: {error!r}") from error


def _parts(path: Path, manifest: dict[str, Any]) -> EnsembleParts:
    digests = {name: (int(about["size"]), str(about["sha256"])) for name, about in manifest.get("files", {}).items()}
    _verify(path, "router/", digests, name="router")
    clusters, experts = [], {}
    for entry in sorted(manifest["clusters"], key=lambda entry: int(entry["index"])):
        cluster = ClusterInfo(id=str(entry["id"]), index=int(entry["index"]), top_terms=tuple(entry["top_terms"]))
        clusters.append(cluster)
        if entry["expert"] is not None:
            experts[cluster.id] = FolderSource(
                name=f"expert {cluster.index}", root=path, relative=str(entry["expert"]), digests=digests
            )
    seed, calibrated = manifest["seed"], manifest.get("calibrated")
    return EnsembleParts(
        run_id=str(manifest["run"]["id"]),
        run_name=str(manifest["run"]["name"]),
        router=load_router(path / "router"),
        tokenizer_dir=path,
        clusters=tuple(clusters),
        experts=experts,
        seed=FolderSource(name="seed", root=path, relative=str(seed), digests=digests) if seed else None,
        recipe=Recipe.from_json(json.dumps(manifest["recipe"])),
        calibrated=RunRouting.from_json(json.dumps(calibrated)) if calibrated else None,
    )


def save_parts(
    parts: EnsembleParts,
    path: Path,
    routing: RoutingOptions,
    *,
    overwrite: bool = False,
    report: Callable[[str], None] = lambda _: None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Writes `parts` to `path`, fetching what is not on this disk yet. `report` is told of each step.

    `extra` are text files for the top of the folder, by name; a config.json among them replaces the usual one.

    Raises AlreadyExists when something is there, unless `overwrite` and it is a saved ensemble.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        if not overwrite:
            raise AlreadyExists(f"{path} exists; choose another folder, or overwrite it")
        if not (path / MANIFEST).is_file():
            raise AlreadyExists(f"{path} exists and is no saved ensemble: it is not overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex[:8]
    building, old = (path.with_name(f".{path.name}.{unique}.{kind}") for kind in ("new", "old"))
    try:
        _write(parts, routing, building, report, extra or {})
        if path.exists():
            path.rename(old)
        building.rename(path)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def ensemble_config(parts: EnsembleParts, routing: RoutingOptions) -> dict[str, Any]:
    """Fields of config.json (`cbtm._config.CbtmConfig`): what the experts have in common, and how they are mixed."""
    expert = json.loads(parts.experts[parts.present[0].id].config_path().read_text("utf-8"))
    return {
        **{key: expert[key] for key in _SHARED_CONFIG if key in expert},
        "num_experts": len(parts.present),
        "num_experts_per_tok": routing.top_k or len(parts.present),
        "routing_temperature": routing.temperature,
        "routing_distance": str(routing.distance),
        "routing_interval": routing.interval,
        "routing_settle_after": routing.settle_after,
        "routing_seed_below": routing.seed_below,
        "routing_policy": str(routing.policy),
        "routing_weights": None if routing.weights is None else list(routing.weights),
    }


def _write(
    parts: EnsembleParts,
    routing: RoutingOptions,
    root: Path,
    report: Callable[[str], None],
    extra: Mapping[str, str],
) -> None:
    root.mkdir()
    for file in tokenizer_files(parts.tokenizer_dir):
        shutil.copyfile(file, root / file.name)
    parts.router.save(root / "router")
    entries = []
    for cluster in parts.clusters:
        source = parts.experts.get(cluster.id)
        relative = f"experts/{cluster.index:04d}" if source is not None else None
        if source is not None and relative is not None:
            report(source.name)
            _copy(source.directory(), root / relative)
        entries.append(
            {"id": cluster.id, "index": cluster.index, "expert": relative, "top_terms": list(cluster.top_terms)}
        )
    if parts.seed is not None:
        report(parts.seed.name)
        _copy(parts.seed.directory(), root / "seed")
    config = {
        "model_type": MODEL_TYPE,
        "architectures": ["CbtmForCausalLM"],
        "auto_map": AUTO_MAP,
        **ensemble_config(parts, routing),
    }
    (root / _MODULE).write_text(_MODULE_TEXT, "utf-8")
    (root / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    for name, text in extra.items():
        safe_join(root, name).write_text(text, "utf-8")
    manifest = {
        "format": FORMAT,
        "run": {"id": parts.run_id, "name": parts.run_name},
        "recipe": json.loads(parts.recipe.to_json()),
        "calibrated": None if parts.calibrated is None else parts.calibrated.model_dump(),
        "clusters": entries,
        "seed": "seed" if parts.seed is not None else None,
        "files": {spec.path: {"size": spec.size, "sha256": spec.sha256} for spec in describe(root)},
    }
    (root / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", "utf-8")


# What the ensemble has in common with each of its experts, and generation tools ask a config for.
_SHARED_CONFIG = ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
_MODULE = "modeling_cbtm.py"
_MODULE_TEXT = "from cbtm import CbtmConfig, CbtmForCausalLM  # noqa: F401\n"
AUTO_MAP = {"AutoConfig": "modeling_cbtm.CbtmConfig", "AutoModelForCausalLM": "modeling_cbtm.CbtmForCausalLM"}
_NOT_TOKENIZER = frozenset({MANIFEST, _MODULE, "config.json", "generation_config.json"})


def tokenizer_files(directory: Path) -> list[Path]:
    """The files directly in `directory`, but for those that are not a tokenizer's."""
    return sorted(
        p
        for p in directory.iterdir()
        if p.is_file() and p.name not in _NOT_TOKENIZER and not p.name.startswith(".") and p.suffix != ".safetensors"
    )


def _copy(source: Path, target: Path) -> Path:
    for file in sorted(p for p in source.rglob("*") if p.is_file()):
        into = target / file.relative_to(source)
        into.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, into)
    return target


def _within(root: Path, relative: str) -> Path:
    """Links are followed: the Hub's client keeps a repository's files elsewhere, and links to them."""
    return root / check_relative(relative)


def _verify(root: Path, prefix: str, digests: Mapping[str, tuple[int, str]], *, name: str) -> None:
    for relative, expected in digests.items():
        if not relative.startswith(prefix):
            continue
        path = _within(root, relative)
        if not path.is_file():
            raise IntegrityError(f"{name}: {path} is missing; copy the whole ensemble folder")
        if hash_file(path) != expected:
            raise IntegrityError(f"{name}: {path} is damaged: it is not the file that was saved; copy it again")
