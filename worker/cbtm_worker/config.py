"""The worker's configuration: one frozen object, from flags and environment, read once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from cbtm_worker.train.job import Shard


def default_cache_dir() -> Path:
    """The user's cache folder for cbtm."""
    return user_cache_path("cbtm")


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """What `cbtm-worker join` was told."""

    # HOST:PORT.
    coordinator: str
    # Join token; needed the first time only.
    token: str | None
    cache_dir: Path
    # "cpu", "cuda:0", or several with commas between them, which train each task together; every GPU when None.
    device: str | None = None
    name: str = ""
    # Only tasks of this run.
    run: str = ""
    # Take no task that trains: only evaluations and replays of what others trained.
    evaluate_only: bool = False
    # Leave after so many finished tasks; None: never.
    max_tasks: int | None = None
    # Leave when there is nothing left to do.
    until_idle: bool = False
    # Sequences in one forward pass at most; found by itself when None.
    micro_batch: int | None = None
    # torch.compile the model; None: on CUDA.
    compile: bool | None = None
    # Whether devices that train a task together share the model.
    shard: Shard = Shard.AUTO
    # Threads of torch on the CPU; torch's default when None.
    threads: int | None = None
    # Files kept in the cache, in bytes; None: without limit.
    max_cache_bytes: int | None = None
