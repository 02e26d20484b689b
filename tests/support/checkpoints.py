"""Checkpoints made by hand, small and valid: what a worker would write, for a model of a few tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.files import describe
from cbtm_common.recipe import Recipe
from cbtm_coordinator.structure.architecture import Architecture, ArchitectureBuilder, Sizes
from cbtm_coordinator.structure.inspection import Expectation, Inspection
from cbtm_coordinator.structure.stream import SafetensorsStream

Tensors = Mapping[str, npt.NDArray[Any]]
CONFIG = {"model_type": "llama", "hidden_size": 5, "architectures": ["LlamaForCausalLM"]}
WEIGHT = "weight"


def base_tensors(salt: int = 0) -> dict[str, npt.NDArray[Any]]:
    """Weights of the one model; those of another `salt` differ, by less than a step of training could change."""
    return {WEIGHT: np.full((5, 5), 1 + 1e-4 * salt, np.float32)}


def write_model(folder: Path, tensors: Tensors) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(dict(tensors), folder / "model.safetensors")


def moments(tensors: Tensors, step: int) -> dict[str, npt.NDArray[Any]]:
    """An optimizer's state of these parameters after `step` steps."""
    made: dict[str, npt.NDArray[Any]] = {}
    for name, tensor in tensors.items():
        made[f"{name}.step"] = np.array(step, np.float32)
        made[f"{name}.exp_avg"] = np.full(tensor.shape, 1e-3, np.float32)
        made[f"{name}.exp_avg_sq"] = np.full(tensor.shape, 1e-6, np.float32)
    return made


def state(spec: ws.TaskSpec, step: int) -> dict[str, Any]:
    """state.json of a checkpoint of this task."""
    seed = spec.task.kind == pb.TASK_KIND_SEED
    return {
        "format": "cbtm-checkpoint-1",
        "task_id": spec.task.id,
        "kind": "seed" if seed else "expert",
        "step": step,
        "total_steps": spec.task.total_steps,
        "recipe_sha256": Recipe.from_json(spec.run.recipe_json).training_sha256(),
        "data_key": spec.run.id if seed else spec.task.cluster_id,
        "loss": 1.0,
        "device": "cpu",
        "precision": "fp32",
        "micro_batch": 1,
        "gradient_checkpointing": False,
    }


def write_checkpoint(folder: Path, spec: ws.TaskSpec, step: int, *, tensors: Tensors | None = None) -> Path:
    """All files of a checkpoint of `spec`'s task at `step`; without an optimizer at the last step."""
    tensors = base_tensors() if tensors is None else tensors
    write_model(folder / "model", tensors)
    if step < spec.task.total_steps:
        save_file(moments(tensors, step), folder / "optimizer.safetensors")
    stamp(folder, spec, step)
    return folder


def stamp(folder: Path, spec: ws.TaskSpec, step: int) -> None:
    """Makes a folder's checkpoint one of this task and step."""
    (folder / "state.json").write_text(json.dumps(state(spec, step)))
    if (folder / "optimizer.safetensors").exists():
        save_file(moments(base_tensors(), step), folder / "optimizer.safetensors")


def learn_architecture(folder: Path, trained: Mapping[str, Any] | None = None) -> Architecture:
    """As the coordinator learns it, from the folder of a base model."""
    builder = ArchitectureBuilder()
    builder.config = json.loads((folder / "config.json").read_text())
    for path in sorted(folder.glob("*.safetensors")):
        stream = SafetensorsStream(
            path.name,
            path.stat().st_size,
            partial(builder.add_header, path.name),
            partial(builder.add_tensor, path.name),
        )
        stream.feed(path.read_bytes())
        stream.finish()
    return builder.build(None if trained is None else {name: tuple(shape) for name, shape in trained.items()})


def inspect(expected: Expectation, folder: Path, *, chunk: int = 1 << 20) -> Sizes:
    """The structural check of the checkpoint in `folder`, its files fed in pieces of `chunk` bytes."""
    files = describe(folder)
    inspection = Inspection(expected, files)
    for file in files:
        reader = inspection.reader(file)
        data = (folder / file.path).read_bytes()
        for start in range(0, len(data), chunk):
            reader.feed(data[start : start + chunk])
        reader.finish()
    return inspection.finish()
