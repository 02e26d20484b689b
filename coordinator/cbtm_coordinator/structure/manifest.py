"""Which files a checkpoint may consist of, and how large they may be: known before a byte of them is sent.

model/*.safetensors, model/config.json, model/generation_config.json, model/model.safetensors.index.json
optimizer.safetensors   not needed at the last step
state.json
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from cbtm_common.errors import CheckpointRejected, InvalidArgument
from cbtm_common.files import FileSpec
from cbtm_common.safetensors_header import MAX_HEADER_BYTES
from cbtm_coordinator.structure.architecture import Architecture

STATE = "state.json"
# Of state.json; what workers write.
STATE_FORMAT = "cbtm-checkpoint-1"
OPTIMIZER = "optimizer.safetensors"
WEIGHTS = "model/model.safetensors"
CONFIG = "model/config.json"
INDEX = "model/model.safetensors.index.json"
_JSON_BYTES = {STATE: 1 << 16, CONFIG: 1 << 20, "model/generation_config.json": 1 << 20, INDEX: MAX_HEADER_BYTES}
_WEIGHTS = re.compile(r"model/[A-Za-z0-9][A-Za-z0-9_.-]{0,199}\.safetensors")


def is_weights(path: str) -> bool:
    """Whether a file of a checkpoint holds tensors of its model."""
    return _WEIGHTS.fullmatch(path) is not None


def check_paths(files: Sequence[FileSpec]) -> None:
    """Raises InvalidArgument for a file that is no part of a checkpoint."""
    for file in files:
        if file.path not in _JSON_BYTES and file.path != OPTIMIZER and not is_weights(file.path):
            known = ", ".join(("model/*.safetensors", OPTIMIZER, *_JSON_BYTES))
            raise InvalidArgument(
                f"files.path: {file.path!r} is not part of a checkpoint ({known})", field="files.path"
            )


def check_manifest(architecture: Architecture, files: Sequence[FileSpec], *, final: bool) -> None:
    """Raises CheckpointRejected when a file is missing, or larger or smaller than what it can honestly hold."""
    sizes = {file.path: file.size for file in files}
    needed = [STATE]
    if architecture.tensors:
        needed += [CONFIG] if final else [CONFIG, OPTIMIZER]
    for path in needed:
        if path not in sizes:
            raise _wrong("files", path, "missing", "one")
    for path, most in _JSON_BYTES.items():
        if sizes.get(path, 0) > most:
            raise _wrong("size", path, f"{sizes[path]} bytes", f"at most {most}")
    weights = [path for path in sizes if is_weights(path)]
    if weights or architecture.tensors:
        # As a reader of such a folder decides: one file of this name, or several and the index that tells of them.
        if (INDEX in sizes) == (WEIGHTS in sizes) or (WEIGHTS in sizes and len(weights) > 1):
            raise _wrong("files", "model", ", ".join(sorted(weights)), f"{WEIGHTS} alone, or pieces and {INDEX}")
        _check_payload("model", sum(sizes[path] for path in weights), architecture.model_bytes, len(weights))
    if OPTIMIZER in sizes:
        _check_payload(OPTIMIZER, sizes[OPTIMIZER], architecture.optimizer_bytes, 1)


def _check_payload(what: str, size: int, payload: int, files: int) -> None:
    """Each file has a header beside its share of the tensors."""
    most = payload + files * (MAX_HEADER_BYTES + 8)
    if not payload <= size <= most:
        raise _wrong("size", what, f"{size} bytes in {files} file(s)", f"{payload} to {most}")


def _wrong(check: str, path: str, found: str, allowed: str) -> CheckpointRejected:
    return rejected(check, path, found=found, allowed=allowed)


def rejected(check: str, path: str, *, found: str, allowed: str, tensor: str = "") -> CheckpointRejected:
    """The error with its evidence. What a stranger wrote is cut short."""
    found = found[:300]
    where = f"{path}: tensor {tensor[:200]!r}" if tensor else path
    evidence = {"check": check, "file": path, "found": found, "allowed": allowed[:300]}
    if tensor:
        evidence["tensor"] = tensor[:200]
    return CheckpointRejected(f"{where}: {check}: found {found}, allowed is {allowed[:300]}", metadata=evidence)
