"""The worker's life: sign in, take a task, train it, give it back, take the next."""

from __future__ import annotations

import logging
import threading
from base64 import b64decode, b64encode
from pathlib import Path

from google.protobuf.message import DecodeError

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.cache import ContentCache
from cbtm_common.errors import (
    RETRYABLE,
    CbtmError,
    CheckpointRejected,
    InternalError,
    InvalidArgument,
    LeaseLost,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
)
from cbtm_common.faults import point
from cbtm_common.files import is_disk_full
from cbtm_common.ids import new_request_id
from cbtm_common.protos import from_duration
from cbtm_common.rpc import Connection, connect
from cbtm_common.transfer import Transfer
from cbtm_worker.checking import CheckRunner
from cbtm_worker.config import WorkerConfig
from cbtm_worker.display import Display
from cbtm_worker.hardware import choose_devices, describe
from cbtm_worker.heartbeat import Heartbeat
from cbtm_worker.identity import Slot, take_slot
from cbtm_worker.inputs import Unfit
from cbtm_worker.local import LocalCheckpoints
from cbtm_worker.session import Held, Session
from cbtm_worker.task import Outcome, TaskContext, TaskRunner, describe_error, describe_task
from cbtm_worker.train.job import Shard

_log = logging.getLogger(__name__)
_TRAINS = (pb.TASK_KIND_SEED, pb.TASK_KIND_EXPERT)
_CHECKS = (pb.TASK_KIND_EVALUATE, pb.TASK_KIND_AUDIT)
_FULL_DISK_WAIT = 60.0
_OUTAGE_WAIT = 5.0
# What the coordinator says when it is away, fails by itself, or has too much to do.
_PASSING: tuple[type[CbtmError], ...] = (*RETRYABLE, InternalError, ResourceExhausted)


def join(config: WorkerConfig, stop: threading.Event, display: Display) -> int:
    """Works until told to stop, idle (with `until_idle`) or done (`max_tasks`); the number of finished tasks."""
    devices = choose_devices(config.device)
    if config.shard is Shard.ALWAYS and len(devices) == 1:
        raise InvalidArgument(
            f"shard: there is one device to train on, {devices[0]}; name several with --device, without --per-gpu, or"
            " leave --shard out",
            field="shard",
        )
    if config.threads is not None:
        import torch

        torch.set_num_threads(config.threads)
    config.cache_dir.mkdir(parents=True, exist_ok=True)
    slot = take_slot(config.cache_dir, config.coordinator)
    cache = ContentCache(config.cache_dir / "files", max_bytes=config.max_cache_bytes)
    known = slot.load()
    try:
        with (
            connect(
                config.coordinator,
                token=config.token,
                fingerprint=known.fingerprint if known else "",
                leaving=stop,
            ) as connection,
            Transfer.beside(connection) as transfer,
        ):
            return Worker(config, stop, display, slot, connection, transfer, cache, devices).run()
    finally:
        cache.close()
        slot.release()


class Worker:
    """One worker process's loop. Coordinator errors that may pass are waited out; those about this worker end it."""

    def __init__(
        self,
        config: WorkerConfig,
        stop: threading.Event,
        display: Display,
        slot: Slot,
        connection: Connection,
        transfer: Transfer,
        cache: ContentCache,
        devices: tuple[str, ...],
    ) -> None:
        self._config = config
        self._stop = stop
        self._display = display
        self._slot = slot
        self._devices = devices
        self._session = Session(connection)
        self._context = TaskContext(
            session=self._session,
            config=config,
            devices=devices,
            cache=cache,
            transfer=transfer,
            tasks_dir=slot.tasks,
            display=display,
            stop=stop,
        )
        self._request_id = new_request_id()
        self._said = ""
        self._finished = 0

    def run(self) -> int:
        hardware = self._hardware()
        self._sign_in(hardware)
        self._display.say(f"training on {', '.join(self._devices)} ({hardware.device_name})")
        may_join_anew = self._config.token is not None
        while not self._stop.is_set() and self._finished != self._config.max_tasks:
            try:
                answer, continued = self._next()
            except _PASSING as error:
                self._say_once(f"the coordinator cannot be asked for work: {error.message}; trying again")
                self._stop.wait(_OUTAGE_WAIT)
                continue
            except Unauthenticated:
                # It does not know this worker any more: its registry is another one by now.
                self._slot.forget()
                if not may_join_anew:
                    raise
                may_join_anew = False
                self._display.say("the coordinator does not know this worker; joining anew")
                self._sign_in(hardware)
                continue
            if answer.HasField("lease"):
                self._said = ""
                self._work(answer, continued)
            elif answer.idle and self._config.until_idle:
                self._display.say(f"leaving: {answer.reason}")
                break
            else:
                self._say_once(f"waiting for work: {answer.reason}")
                self._stop.wait(from_duration(answer.retry_after).total_seconds())
        self._display.say(f"left with {self._finished} task(s) finished; thank you")
        return self._finished

    def _sign_in(self, hardware: pb.Hardware) -> None:
        request_id = new_request_id()
        while True:
            try:
                identity = self._session.sign_in(
                    self._slot,
                    token=self._config.token,
                    name=self._config.name,
                    hardware=hardware,
                    request_id=request_id,
                )
                break
            except ResourceExhausted as error:
                self._say_once(f"{error.message}; looking again in a minute")
                if self._stop.wait(_FULL_DISK_WAIT):
                    raise
        self._display.say(f"joined {self._config.coordinator} as {self._config.name} ({identity.worker_id})")

    def _say_once(self, message: str) -> None:
        if message != self._said:
            self._display.say(message)
        self._said = message

    def _hardware(self) -> pb.Hardware:
        hardware = describe(self._devices[0], self._config.cache_dir)
        hardware.device_count = len(self._devices)
        return hardware

    # The lease in hand, kept on disk so that a process that died goes on with it

    @property
    def _lease_path(self) -> Path:
        return self._slot.directory / "lease"

    def _next(self) -> tuple[ws.AcquireLeaseResponse, bool]:
        """(what to do now, whether it goes on with the lease of a former process)."""
        unfinished = self._unfinished()
        if unfinished is not None:
            return unfinished, True
        point("worker.acquire.before")
        kinds = _CHECKS if self._config.evaluate_only else (*_TRAINS, *_CHECKS)
        answer = self._session.acquire(self._hardware(), self._config.run, self._request_id, kinds)
        point("worker.acquire.after_answer")
        self._request_id = new_request_id()
        return answer, False

    def _unfinished(self) -> ws.AcquireLeaseResponse | None:
        """The lease that a former process of this slot held, if it still holds."""
        try:
            answer = ws.AcquireLeaseResponse.FromString(b64decode(self._lease_path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, DecodeError) as error:
            # A power failure damaged it; the lease ends by itself.
            _log.warning("%s cannot be read: %s", self._lease_path, error)
            self._lease_path.unlink()
            return None
        held = Held(lease_id=answer.lease.id, epoch=answer.lease.epoch)
        try:
            self._session.renew(held, pb.Progress(step=answer.spec.task.committed_step, phase="download"))
        except (LeaseLost, NotFound, PermissionDenied) as error:
            _log.info("the lease of the former process is over: %s", error.message)
            self._lease_path.unlink()
            return None
        self._display.say("going on with the task of the former process")
        return answer

    def _keep(self, answer: ws.AcquireLeaseResponse) -> None:
        temporary = self._lease_path.with_suffix(".tmp")
        temporary.write_bytes(b64encode(answer.SerializeToString()))
        temporary.replace(self._lease_path)

    # One task

    def _work(self, answer: ws.AcquireLeaseResponse, continued: bool) -> None:
        held = Held(lease_id=answer.lease.id, epoch=answer.lease.epoch)
        task = answer.spec.task
        what = f"{describe_task(task)} of {answer.spec.run.name}"
        begin = f"from step {task.committed_step:,}" if task.committed_step else "from the start"
        self._display.say(f"took {what}, {begin}")
        heartbeat = Heartbeat(
            self._session, held, answer.spec.policy, committed_step=task.committed_step, say=self._display.say
        )
        heartbeat.start()
        try:
            self._keep(answer)
            point("worker.acquire.after")
            if task.kind in _CHECKS:
                outcome = CheckRunner(self._context, held, answer.spec, heartbeat).run()
            else:
                outcome = TaskRunner(self._context, held, answer.spec, heartbeat, continued=continued).run()
        except Exception as error:  # noqa: BLE001  # whatever happens to one task, the next may go well
            # A rejection ends the lease, and says more than that it is lost.
            rejected = isinstance(error, CheckpointRejected)
            self._give_up(held, task, what, error if rejected else heartbeat.lost or error)
            return
        finally:
            heartbeat.close()
            self._display.rest()
        self._hand_back(held, task, what, outcome, heartbeat.stop_reason)

    def _hand_back(self, held: Held, task: pb.Task, what: str, outcome: Outcome, stop_reason: str) -> None:
        if outcome is Outcome.KEPT:
            # The lease stays noted: the next process in this slot goes on with it, or with the task if it gets it.
            self._display.say(
                f"{what} cannot be handed in now; what was done of it is kept here: join again to go on with it"
            )
            return
        if outcome is Outcome.FINISHED:
            self._release(held, ws.RELEASE_REASON_FINISHED, "")
            self._finished += 1
            LocalCheckpoints(self._slot.tasks / task.id).clear()
            self._display.say(f"finished {what}")
        else:
            self._release(held, ws.RELEASE_REASON_PREEMPTED, stop_reason or "the volunteer stopped the worker")
            self._display.say(f"saved and gave back {what}; somebody else can go on with it")

    def _give_up(self, held: Held, task: pb.Task, what: str, error: Exception) -> None:
        """Gives a task back that cannot go on here, saying why."""
        from cbtm_worker.train import OutOfDeviceMemory

        if is_disk_full(error):
            error = ResourceExhausted(f"the disk under {self._config.cache_dir} is full: {error}")
        reason = describe_error(error)
        _log.debug("the task ended early", exc_info=error)
        if isinstance(error, LeaseLost | NotFound):
            self._display.say(f"dropped {what}: {reason}")
            self._lease_path.unlink(missing_ok=True)
            return
        self._display.say(f"cannot go on with {what}: {reason}")
        if isinstance(error, PermissionDenied | Unauthenticated):
            raise error
        if isinstance(error, OutOfDeviceMemory | Unfit):
            self._release(held, ws.RELEASE_REASON_UNFIT, reason)
        elif isinstance(error, ResourceExhausted):
            self._release(held, ws.RELEASE_REASON_PREEMPTED, reason)
            if not self._stop.is_set():
                self._display.say(f"free some room under {self._config.cache_dir}; looking again in a minute")
            self._stop.wait(_FULL_DISK_WAIT)
        else:
            self._release(held, ws.RELEASE_REASON_FAILED, reason)
            # It may be what is on this disk: the next try starts from the coordinator's checkpoint.
            LocalCheckpoints(self._slot.tasks / task.id).clear()

    def _release(self, held: Held, reason: ws.ReleaseReason.ValueType, detail: str) -> None:
        """Tells the coordinator; if it cannot be told, the lease ends by itself."""
        try:
            point("worker.release.before")
            self._session.release(held, reason, detail)
            point("worker.release.after_call")
        except LeaseLost as error:
            _log.info("the lease is over already: %s", error.message)
        except CbtmError as error:
            self._display.say(f"the lease could not be given back ({error.message}); it ends by itself")
        self._lease_path.unlink(missing_ok=True)
        point("worker.release.after")
