"""Begins the structural check of a checkpoint: fetches what it must be like from the registry.

What a run's models look like is learned when the run starts; of a run that an older version started, when its first
checkpoint comes, from the same files. It is kept in memory, for it does not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from cbtm_common import strict_json
from cbtm_common.errors import IntegrityError, InvalidArgument
from cbtm_common.files import FileSpec
from cbtm_common.recipe import Recipe
from cbtm_coordinator.lifecycle import TaskKind
from cbtm_coordinator.storage import ObjectStore, verify
from cbtm_coordinator.store import Connection, Store, checkpoints, experts, runs, structure
from cbtm_coordinator.store.records import CheckpointRecord, TaskRecord
from cbtm_coordinator.structure.architecture import (
    Architecture,
    ArchitectureBuilder,
    Shape,
    Sizes,
    sizes_from_json,
    sizes_to_json,
)
from cbtm_coordinator.structure.inspection import Expectation, Inspection
from cbtm_coordinator.structure.manifest import STATE_FORMAT, check_manifest
from cbtm_coordinator.structure.stream import SafetensorsStream

_MAX_RUNS = 64
_CONFIG = "config.json"
_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class _Known:
    run_id: str
    data_run_id: str
    recipe: Recipe
    architecture: Architecture


class Structures:
    """Thread-safe: what is kept is replaced whole."""

    def __init__(self, store: Store, objects: ObjectStore) -> None:
        self._store = store
        self._objects = objects
        self._known: dict[str, _Known] = {}

    def learn(self, files: Sequence[FileSpec], trained: Mapping[str, Shape] | None = None) -> Architecture:
        """What models branched from a base model of these files look like. Verifies the files too.

        Raises NotFound or IntegrityError, naming the file; InvalidArgument when none of them holds weights.
        """
        builder = ArchitectureBuilder()
        for file in files:
            if file.path.endswith(".safetensors"):
                stream = SafetensorsStream(
                    file.path, file.size, partial(builder.add_header, file.path), partial(builder.add_tensor, file.path)
                )
                verify(self._objects, file, stream)
            else:
                verify(self._objects, file)
            if file.path == _CONFIG:
                builder.config = self._config(file)
        architecture = builder.build(trained)
        if not architecture.tensors:
            raise InvalidArgument("base model: none of its files is safetensors", field="files")
        return architecture

    def _config(self, file: FileSpec) -> dict[str, Any]:
        if file.size > _CONFIG_BYTES:
            raise IntegrityError(f"{file.path}: {file.size} bytes are more than a config's {_CONFIG_BYTES}")
        try:
            config = strict_json.loads(b"".join(self._objects.read(file.key)))
        except ValueError as error:
            raise IntegrityError(f"{file.path}: is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise IntegrityError(f"{file.path}: is not an object")
        return config

    def check_manifest(self, tx: Connection, task: TaskRecord, step: int, files: Sequence[FileSpec]) -> None:
        """Raises CheckpointRejected before a byte is sent, where the run's models are known already."""
        known = self._find(tx, task)
        if known is not None:
            check_manifest(known.architecture, files, final=step == task.total_steps)

    def begin(self, checkpoint: CheckpointRecord, task: TaskRecord) -> Inspection:
        """The check of a checkpoint. Raises CheckpointRejected when its list of files is wrong already."""
        with self._store.reading() as tx:
            known = self._find(tx, task)
        if known is None:
            self._learn_late(task)
            with self._store.reading() as tx:
                known = self._find(tx, task)
            assert known is not None
        with self._store.reading() as tx:
            expected = _expectation(tx, known, checkpoint, task)
        return Inspection(expected, checkpoint.files)

    def _find(self, tx: Connection, task: TaskRecord) -> _Known | None:
        known = self._known.get(task.run_id)
        if known is not None:
            return known
        run = runs.get_by_id(tx, task.run_id)
        text = structure.architecture(tx, run.data_run_id)
        if text is None:
            return None
        known = _Known(
            run_id=run.id,
            data_run_id=run.data_run_id,
            recipe=Recipe.from_json(run.recipe_json),
            architecture=Architecture.from_json(text),
        )
        kept = dict(list(self._known.items())[-_MAX_RUNS:])
        self._known = {**kept, task.run_id: known}
        return known

    def _learn_late(self, task: TaskRecord) -> None:
        with self._store.reading() as tx:
            run = runs.get_by_id(tx, task.run_id)
            files = [entry.file for entry in runs.files(tx, run, "BASE_MODEL")]
        architecture = self.learn(files)
        with self._store.writing() as tx:
            structure.add_architecture(tx, run.data_run_id, architecture.to_json())


def add_architecture(tx: Connection, run_id: str, architecture: Architecture) -> None:
    structure.add_architecture(tx, run_id, architecture.to_json())


def add_sizes(tx: Connection, checkpoint_id: str, sizes: Sizes) -> None:
    """With the commit, so that the next checkpoint is compared with this one."""
    if sizes:
        structure.add_sizes(tx, checkpoint_id, sizes_to_json(sizes))


def _expectation(tx: Connection, known: _Known, checkpoint: CheckpointRecord, task: TaskRecord) -> Expectation:
    seed_task = task.kind is TaskKind.SEED
    recipe = known.recipe.of_task(seed=seed_task)
    start = before = known.architecture.sizes
    before_step = 0
    if known.architecture.tensors:
        seed = None if seed_task else experts.seed(tx, known.run_id)
        if seed is not None and seed.checkpoint_id is not None:
            start = before = _sizes(tx, seed.checkpoint_id) or start
        newest = checkpoints.latest_good(tx, task)
        sizes = None if newest is None else _sizes(tx, newest.id)
        if newest is not None and sizes is not None:
            before, before_step = sizes, newest.step
    return Expectation(
        architecture=known.architecture,
        optimizer=recipe.optimizer,
        learning_rate=recipe.peak_learning_rate(seed=seed_task),
        step=checkpoint.step,
        total_steps=task.total_steps,
        state={
            "format": STATE_FORMAT,
            "task_id": task.id,
            "kind": task.kind.value.lower(),
            "step": checkpoint.step,
            "total_steps": task.total_steps,
            "recipe_sha256": recipe.training_sha256(),
            "data_key": known.run_id if seed_task else task.cluster_id,
        },
        start=start,
        before=before,
        before_step=before_step,
    )


def sizes_at(tx: Connection, task: TaskRecord, checkpoint_id: str | None) -> Sizes:
    """Of the weights at a task's checkpoint, or of those that it branched from; none where they are not known."""
    if checkpoint_id is not None:
        return _sizes(tx, checkpoint_id) or {}
    seed = None if task.kind is TaskKind.SEED else experts.seed(tx, task.run_id)
    if seed is not None and seed.checkpoint_id is not None:
        return _sizes(tx, seed.checkpoint_id) or {}
    text = structure.architecture(tx, runs.get_by_id(tx, task.run_id).data_run_id)
    return {} if text is None else Architecture.from_json(text).sizes


def _sizes(tx: Connection, checkpoint_id: str) -> Sizes | None:
    text = structure.sizes(tx, checkpoint_id)
    return None if text is None else sizes_from_json(text)
