"""What a process of a group says of its own end to those that survive it: a file for each, in the group's folder."""

from __future__ import annotations

import json
from pathlib import Path

from cbtm_common.errors import CbtmError, InternalError
from cbtm_worker.train.errors import OutOfDeviceMemory, StartAgain


def leave_word(folder: Path, rank: int, device: str, error: Exception) -> None:
    """Says that `error` ends the process `rank`. The first process may have gone before, and the folder with it."""
    text = error.message if isinstance(error, CbtmError) else f"{type(error).__name__}: {error}"
    said = {
        "kind": type(error).__name__,
        "message": text if text.startswith(device) else f"{device}: {text}",
        "changes": error.changes if isinstance(error, StartAgain) else {},
    }
    partial = folder / f".error-{rank}"
    try:
        partial.write_text(json.dumps(said), "utf-8")
        partial.rename(folder / f"error-{rank}")
    except FileNotFoundError:
        return


def word_left(folder: Path) -> CbtmError | None:
    """The error of the first process that said one."""
    for path in sorted(folder.glob("error-*")):
        said = json.loads(path.read_text("utf-8"))
        match said["kind"]:
            case OutOfDeviceMemory.__name__:
                return OutOfDeviceMemory(said["message"])
            case StartAgain.__name__:
                return StartAgain(said["message"], changes=said["changes"])
        return InternalError(said["message"])
    return None


def lost(folder: Path, error: Exception) -> CbtmError:
    """What to raise when another process is gone: what it said of its own end, if it did."""
    silent = InternalError(f"a process that trains this task on another device has ended: {error}")
    return word_left(folder) or silent
