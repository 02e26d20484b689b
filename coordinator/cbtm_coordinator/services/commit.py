"""Checks a checkpoint before it becomes visible: completes its uploads, reads every object, once, and judges it.

The check may have to read 80 GB back, longer than any call should last. So it runs on threads of its own; a call waits
for it a few seconds and otherwise answers that it goes on, and the worker asks again. Nothing is kept in memory that
matters: a coordinator that dies here leaves an UPLOADING checkpoint, and the next call begins the check anew.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from cbtm_common.errors import IntegrityError
from cbtm_common.faults import point
from cbtm_common.files import FileSpec
from cbtm_coordinator.storage import ObjectStore, discard, finish_upload, verify
from cbtm_coordinator.structure.architecture import Sizes
from cbtm_coordinator.structure.inspection import Inspection


class Verifier:
    """Checks the objects of checkpoints on `threads` threads, each checkpoint once at a time.

    At most `waiters` calls wait for a check at once, the others are told to ask again: a call that waits holds a
    thread of the server, and renewals need those.
    """

    def __init__(self, objects: ObjectStore, *, part_size: int, threads: int = 4, waiters: int = 8) -> None:
        self._objects = objects
        self._part_size = part_size
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")
        # Checkpoint id to the files that are being checked, or were since it was last asked for, and the outcome.
        self._checks: dict[str, tuple[tuple[FileSpec, ...], Future[Sizes]]] = {}
        self._lock = threading.Lock()
        self._waiting = threading.Semaphore(waiters)

    def wait(
        self, checkpoint_id: str, files: Sequence[FileSpec], begin: Callable[[], Inspection], timeout: float
    ) -> Sizes | None:
        """The sizes of its weights once all of `files` are checked; None while the check goes on after `timeout`
        seconds.

        `begin` is called on a thread of the check. Raises NotFound for what is missing, IntegrityError for what is not
        the bytes announced (and removes it, so that a new upload of the right ones is possible), CheckpointRejected
        for bytes that are no such checkpoint.
        """
        wanted = tuple(files)
        with self._lock:
            checked, future = self._checks.get(checkpoint_id, (wanted, None))
            if checked != wanted:
                # Announced anew with other bytes. An old check still running removes what it takes for wrong, so the
                # new one begins when that has ended.
                if future is not None and not future.done():
                    return None
                future = None
            if future is None:
                future = self._pool.submit(self._check, wanted, begin)
                self._checks[checkpoint_id] = wanted, future
        if not self._ended(future, timeout):
            return None
        with self._lock:
            if self._checks.get(checkpoint_id) == (wanted, future):
                del self._checks[checkpoint_id]
        return future.result()

    def _ended(self, future: Future[Sizes], timeout: float) -> bool:
        if not self._waiting.acquire(blocking=False):
            return future.done()
        try:
            return bool(wait([future], timeout).done)
        finally:
            self._waiting.release()

    def _check(self, files: Sequence[FileSpec], begin: Callable[[], Inspection]) -> Sizes:
        for file in files:
            finish_upload(self._objects, file, part_size=self._part_size)
        point("coordinator.commit.after_complete")
        inspection = begin()
        for file in files:
            try:
                verify(self._objects, file, inspection.reader(file))
            except IntegrityError:
                discard(self._objects, file)
                raise
        return inspection.finish()

    def close(self, seconds: float = 0.0) -> bool:
        """Drops the checks that wait; whether those that run end within `seconds`.

        What does not is begun anew by the next process, when workers ask it.
        """
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            running = [future for _, future in self._checks.values() if not future.cancelled()]
        return not wait(running, seconds).not_done
