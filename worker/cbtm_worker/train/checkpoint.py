"""Checkpoints on disk, and the snapshots they are written from.

    model/                  a Hugging Face directory: config.json, float32 safetensors in pieces of at most 4 GB
    optimizer.safetensors   `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`; absent from a final checkpoint
    state.json              `CheckpointState`: which job, which step, how it was computed

A directory appears whole or not at all: it is written beside its place, synced to the disk, and renamed. No pickle.
Not covered: moving checkpoints anywhere, or digests of their files (whoever uploads them takes those).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from cbtm_common import faults
from cbtm_common.errors import IntegrityError, InvalidState, ResourceExhausted
from cbtm_common.files import is_disk_full
from cbtm_worker.train.job import TaskKind, TrainJob

FORMAT = "cbtm-checkpoint-1"
MODEL = "model"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"

_PIECE = "4GB"
# Room for configs, headers and the file system's own beside the tensors.
_SLACK_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """state.json. Above the line: what the weights are a function of, checked on a resume."""

    task_id: str
    kind: TaskKind
    # Optimizer steps done.
    step: int
    total_steps: int
    recipe_sha256: str
    data_key: str
    # --------------------------------------------------------------------------------------------------------------
    # Of the last step, nats a token; None before the first.
    loss: float | None
    # How it was computed. A resume on a device of the same name keeps the cut, and so the bits.
    device: str
    precision: str
    micro_batch: int
    gradient_checkpointing: bool
    # Checkpoints of earlier releases, which do not say these, were not, and by one.
    compiled: bool = False
    devices: int = 1
    format: str = FORMAT


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Copies, in host memory, of all that a checkpoint holds. Nothing in it changes while training goes on."""

    state: CheckpointState
    # The model's state dict; tied weights are one tensor under several names.
    weights: Mapping[str, torch.Tensor]
    # None when it was taken for a final checkpoint.
    optimizer: Mapping[str, torch.Tensor] | None
    # Config and layout of the model, without weights.
    skeleton: PreTrainedModel

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, about what a checkpoint takes on disk."""
        tensors = {t.data_ptr(): t.nbytes for t in [*self.weights.values(), *(self.optimizer or {}).values()]}
        return sum(tensors.values())


def write_checkpoint(snapshot: Snapshot, directory: Path, *, final: bool) -> None:
    """Writes `directory`, in place of an older one of that name. Safe on any thread, while training goes on.

    A final checkpoint leaves out the optimizer. Raises ResourceExhausted when the disk is, or would be, full.
    """
    if snapshot.optimizer is None and not final:
        raise InvalidState("a snapshot without optimizer state can only be written as a final checkpoint")
    directory.parent.mkdir(parents=True, exist_ok=True)
    _require_space(directory.parent, snapshot.nbytes + _SLACK_BYTES)
    temporary = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.partial")
    try:
        faults.point("worker.checkpoint.before_write")
        _write(snapshot, temporary, final=final)
        _sync_tree(temporary)
        faults.point("worker.checkpoint.after_write")
        if directory.exists():
            shutil.rmtree(directory)
        temporary.rename(directory)
    except (OSError, SafetensorError) as error:
        if _is_full(error):
            raise ResourceExhausted(f"the disk under {directory.parent} is full: {error}") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync(directory.parent)


def remove_partial(parent: Path) -> None:
    """Removes what writes that were cut off left in `parent`. Only when nobody writes there."""
    for path in parent.glob(".*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def read_state(directory: Path) -> CheckpointState:
    """Reads state.json. Raises IntegrityError when it is absent or not of this format."""
    path = directory / STATE
    try:
        data = json.loads(path.read_text("utf-8"))
        if data["format"] != FORMAT:
            raise IntegrityError(f"{path}: format is {data['format']!r}, not {FORMAT!r}")
        # A later version may say more.
        state = CheckpointState(**{k: v for k, v in data.items() if k in CheckpointState.__dataclass_fields__})
        if not 0 <= state.step <= state.total_steps:
            raise IntegrityError(f"{path}: step {state.step} of {state.total_steps}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{path}: is no state of a checkpoint: {error!r}") from error
    return state


def check_resumable(state: CheckpointState, job: TrainJob) -> None:
    """Raises InvalidState, naming the first difference, unless the checkpoint is of this very job."""
    ours = {
        "recipe_sha256": job.recipe.training_sha256(),
        "kind": job.kind,
        "data_key": job.data_key,
        "total_steps": job.total_steps,
    }
    for name, value in ours.items():
        if getattr(state, name) != value:
            raise InvalidState(f"{job.resume_dir}: checkpoint's {name} is {getattr(state, name)!r}, not {value!r}")


def read_optimizer(directory: Path) -> dict[str, torch.Tensor]:
    """Optimizer state by name. Raises IntegrityError when the file is absent or unreadable."""
    path = directory / OPTIMIZER
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except (OSError, SafetensorError) as error:
        raise IntegrityError(f"{path}: cannot be read: {error}") from error


def _write(snapshot: Snapshot, directory: Path, *, final: bool) -> None:
    directory.mkdir()
    snapshot.skeleton.save_pretrained(
        directory / MODEL, state_dict=dict(snapshot.weights), max_shard_size=_PIECE, save_original_format=True
    )
    if not final:
        assert snapshot.optimizer is not None
        save_file(dict(snapshot.optimizer), directory / OPTIMIZER)
    text = json.dumps(asdict(snapshot.state), indent=2, sort_keys=True, allow_nan=False)
    (directory / STATE).write_text(text + "\n", "utf-8")


def _require_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise ResourceExhausted(
            f"a checkpoint needs {needed / 1e9:.2f} GB under {directory}, {free / 1e9:.2f} GB are free:"
            " make room or choose another cache folder"
        )


def _is_full(error: Exception) -> bool:
    # safetensors says it in words only.
    return is_disk_full(error) or "os error 28" in str(error)


def _sync_tree(directory: Path) -> None:
    for path in directory.rglob("*"):
        _sync(path)
    _sync(directory)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle to sync a directory by
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def host_copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in host memory, aliases kept as aliases. Waits for the device; returns when every copy is whole."""
    sources = {id(tensor): tensor for tensor in tensors.values()}
    # Pinned memory lets the copies queue up on the device's stream at the full speed of the bus, and PyTorch keeps its
    # blocks for the next snapshot; a large share of a machine's memory must not be pinned.
    on_cuda = any(t.device.type == "cuda" for t in sources.values())
    pinned = on_cuda and 4 * sum(t.nbytes for t in sources.values()) <= psutil.virtual_memory().available
    copies = {}
    with torch.no_grad():
        for key, source in sources.items():
            copies[key] = torch.empty(source.shape, dtype=source.dtype, pin_memory=pinned)
            copies[key].copy_(source, non_blocking=pinned)
    if pinned:
        torch.cuda.synchronize()
    return {name: copies[id(tensor)] for name, tensor in tensors.items()}
