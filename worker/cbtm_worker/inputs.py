"""What a task reads: its shards, and the model or checkpoint that it starts from, as verified local files.

A coordinator or store that is away is waited for, and wrong bytes are fetched again; only weights and configs are
read, and a config that names code of its own is refused. Not here: what to do with the files.
"""

from __future__ import annotations

import random
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common import strict_json
from cbtm_common.cache import ContentCache
from cbtm_common.cli import human_bytes
from cbtm_common.errors import (
    RETRYABLE,
    Cancelled,
    CbtmError,
    IntegrityError,
    InternalError,
    InvalidArgument,
    InvalidState,
)
from cbtm_common.files import FileSpec
from cbtm_common.rpc import RetryPolicy
from cbtm_common.safetensors_header import read_header
from cbtm_common.transfer import Transfer
from cbtm_worker.heartbeat import Heartbeat
from cbtm_worker.session import Held, Session

_T = TypeVar("_T")
_RETRY = RetryPolicy(initial=1.0, maximum=30.0)
# Tries in all when bytes are wrong, or the coordinator failed by itself.
_TRIES = 3
# Failures that may pass. When it was us who cancelled, the next round says so.
_PASSING: tuple[type[CbtmError], ...] = (*RETRYABLE, Cancelled)
_READ = (".safetensors", ".json")
# The index of a model of 100,000 tensors takes about as much.
_MAX_JSON_BYTES = 16 << 20
# On the disk at one time at least: the last committed checkpoint, and the next one.
_CHECKPOINTS = 2
# A checkpoint holds weights and two moments.
_MODELS_IN_A_CHECKPOINT = 3


class Unfit(InvalidState):
    """This machine cannot do this task, now or later."""


@dataclass(frozen=True, kw_only=True)
class TaskFiles:
    """Shards in training order; `resume_dir` None: from the beginning, of the model in `model_dir`."""

    shard_paths: list[Path]
    model_dir: Path
    resume_dir: Path | None


class Inputs:
    """Fetches for one task under one lease. `cancelled` ends every wait; `on_bytes` counts what came."""

    def __init__(
        self,
        session: Session,
        held: Held,
        heartbeat: Heartbeat,
        cache: ContentCache,
        transfer: Transfer,
        *,
        cancelled: threading.Event,
        on_bytes: Callable[[int], None],
        say: Callable[[str], None],
    ) -> None:
        self._session = session
        self._held = held
        self._heartbeat = heartbeat
        self._cache = cache
        self._transfer = transfer
        self._cancelled = cancelled
        self._on_bytes = on_bytes
        self._say = say
        self._used: list[FileSpec] = []

    def fetch(self, spec: ws.TaskSpec, folder: Path, local_resume: Path | None) -> TaskFiles:
        """`folder` gets `base/` or `from/`, unless a checkpoint on this disk, `local_resume`, is gone on from.

        Raises Unfit, ResourceExhausted (disk full), IntegrityError, InvalidArgument (a model that is refused),
        Cancelled, and whatever ended the lease.
        """
        shards = self._retried(lambda: self._session.shards(self._held))
        resumes = spec.HasField("resume_from")
        source = [FileSpec.from_proto(f) for f in (spec.resume_from.files if resumes else spec.base_model_files)]
        source = [f for f in source if f.path.endswith(_READ)]
        size = sum(f.size for f in source)
        refusal = disk_refusal(
            total_bytes=shutil.disk_usage(folder).total,
            input_bytes=sum(f.size for f in shards) + size,
            checkpoint_bytes=size if resumes else _MODELS_IN_A_CHECKPOINT * size,
        )
        if refusal:
            raise Unfit(f"{folder}: {refusal}; choose a --cache-dir on a larger disk")
        paths = self._fetch_all(shards)
        base, start = folder / "base", folder / "from"
        resume_dir = local_resume
        if resume_dir is None and resumes:
            resume_dir = self._materialize(source, start)
            check_model(start)
            check_model(start / "model")
        elif resume_dir is None:
            self._materialize(source, base)
            check_model(base)
        return TaskFiles(shard_paths=[paths[s.path] for s in shards], model_dir=base, resume_dir=resume_dir)

    def fetch_files(self, files: list[FileSpec]) -> dict[str, Path]:
        """Verified files in the cache, by path. Raises as `fetch` does."""
        return self._fetch_all(files)

    def fetch_model(self, files: list[FileSpec], folder: Path) -> Path:
        """A model's weights and configs, as a directory. Raises as `fetch` does."""
        return self._materialize([f for f in files if f.path.endswith(_READ)], folder)

    def release(self) -> None:
        """The files may be dropped from the cache."""
        self._cache.release(self._used)
        self._used = []

    def _fetch_all(self, files: list[FileSpec]) -> dict[str, Path]:
        return self._retried(
            lambda: self._cache.fetch_all(
                files, self._urls, self._transfer, on_bytes=self._on_bytes, cancelled=self._cancelled
            ),
            files,
        )

    def _materialize(self, files: list[FileSpec], folder: Path) -> Path:
        # What an earlier lease left there is of another checkpoint.
        shutil.rmtree(folder, ignore_errors=True)
        return self._retried(
            lambda: self._cache.materialize(
                files, folder, self._urls, self._transfer, on_bytes=self._on_bytes, cancelled=self._cancelled
            ),
            files,
        )

    def _urls(self, keys: list[str]) -> Sequence[pb.Download]:
        return self._session.downloads(self._held, keys)

    def _retried(self, action: Callable[[], _T], files: Sequence[FileSpec] = ()) -> _T:
        attempt = wrong = 0
        said = ""
        while True:
            self._heartbeat.check()
            if self._cancelled.is_set():
                raise Cancelled("the download was cancelled")
            try:
                result = action()
            except (IntegrityError, InternalError) as error:
                wrong += 1
                if wrong >= _TRIES:
                    raise
                failure = error.message
            except _PASSING as error:
                failure = error.message
            else:
                self._used += files
                return result
            # Each try pinned them once.
            self._cache.release(files)
            if failure != said and not self._cancelled.is_set():
                self._say(f"waiting, to try again: {failure}")
                said = failure
            self._cancelled.wait(_RETRY.delay(min(attempt, 10), random.random()))
            attempt += 1


def disk_refusal(*, total_bytes: int, input_bytes: int, checkpoint_bytes: int) -> str | None:
    """Why a disk of `total_bytes` can never hold a task, or None. What is free now does not count: it may change."""
    need = input_bytes + _CHECKPOINTS * checkpoint_bytes
    if need <= total_bytes:
        return None
    return f"the task takes about {human_bytes(need)}, and this whole disk has {human_bytes(total_bytes)}"


def check_model(directory: Path) -> None:
    """Looks at the files of one folder before any library does.

    Raises InvalidArgument when a config names code of its own, IntegrityError for headers and JSON that are none.
    """
    for path in sorted(directory.glob("*.safetensors")):
        read_header(path)
    for path in sorted(directory.glob("*.json")):
        try:
            if path.stat().st_size > _MAX_JSON_BYTES:
                raise ValueError(f"over {_MAX_JSON_BYTES} bytes")
            fields = strict_json.loads(path.read_bytes())
        except ValueError as error:
            raise IntegrityError(f"{path.name}: is not JSON: {error}") from error
        named = [name for name in ("auto_map", "trust_remote_code") if isinstance(fields, dict) and fields.get(name)]
        if named:
            raise InvalidArgument(
                f"{path.name}: names code of its own ({named[0]}), and a worker never runs code from a run",
                field=named[0],
            )
