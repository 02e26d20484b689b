"""Makes a checkpoint visible: completes its uploads, checks every object, then changes the registry.

The check may have to read 80 GB back, longer than any call should last. So it runs on threads of its own; a call waits
for it a few seconds and otherwise answers that it goes on, and the worker asks again. Nothing is kept in memory that
matters: a coordinator that dies here leaves an UPLOADING checkpoint, and the next call begins the check anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout

from cbtm_common.errors import IntegrityError
from cbtm_common.faults import point
from cbtm_common.files import FileSpec
from cbtm_coordinator.storage import ObjectStore, discard, finish_upload, verify


class Verifier:
    """Checks the objects of checkpoints on `threads` threads, each checkpoint once at a time."""

    def __init__(self, objects: ObjectStore, *, part_size: int, threads: int = 4) -> None:
        self._objects = objects
        self._part_size = part_size
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")
        self._running: dict[str, Future[None]] = {}
        self._lock = threading.Lock()

    def wait(self, checkpoint_id: str, files: Sequence[FileSpec], timeout: float) -> bool:
        """Whether all is checked within `timeout` seconds; False while the check goes on.

        Raises NotFound for what is missing, IntegrityError for what is wrong (and removes it, so that a new upload of
        the right bytes is possible).
        """
        with self._lock:
            future = self._running.get(checkpoint_id)
            if future is None:
                future = self._pool.submit(self._check, files)
                self._running[checkpoint_id] = future
        try:
            future.result(timeout)
        except FutureTimeout:
            if not future.done():
                return False
            raise
        finally:
            if future.done():
                with self._lock:
                    self._running.pop(checkpoint_id, None)
        return True

    def _check(self, files: Sequence[FileSpec]) -> None:
        for file in files:
            finish_upload(self._objects, file, part_size=self._part_size)
        point("coordinator.commit.after_complete")
        for file in files:
            try:
                verify(self._objects, file)
            except IntegrityError:
                discard(self._objects, file)
                raise

    def close(self, *, wait: Callable[[], bool] = lambda: True) -> None:
        self._pool.shutdown(wait=wait(), cancel_futures=True)
