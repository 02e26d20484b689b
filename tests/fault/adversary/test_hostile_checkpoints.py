"""A worker with a valid token hands in files that no honest worker makes. Each is rejected, with its evidence."""

from __future__ import annotations

import contextlib
import json
import pickle
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from cbtm_api.v1 import admin_service_pb2 as ad
from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.errors import CheckpointRejected, IntegrityError, InvalidArgument, LeaseLost
from cbtm_common.files import describe
from cbtm_common.rpc import Connection
from tests.support.checkpoints import base_tensors, moments, stamp
from tests.support.coordinator import RunningCoordinator, running_coordinator
from tests.support.raw_run import RawWorker, checkpoint_folder, make_run

pytestmark = pytest.mark.integration

STEP = 3
Tamper = Callable[[Path], None]


def weights(data: bytes) -> Tamper:
    return lambda folder: _write(folder / "model" / "model.safetensors", data)


def tensors(**changed: Any) -> Tamper:
    """The model's tensors, some of them others, None for none."""
    made = {**base_tensors(), **changed}
    return weights(save({name: tensor for name, tensor in made.items() if tensor is not None}))


def optimizer(**changed: Any) -> Tamper:
    """`field`: what stands there of the one parameter; None for none."""
    made = moments(base_tensors(), STEP) | {f"weight.{name}": value for name, value in changed.items()}
    kept = {name: tensor for name, tensor in made.items() if tensor is not None}
    return lambda folder: save_file(kept, folder / "optimizer.safetensors")


def text(path: str, data: bytes) -> Tamper:
    return lambda folder: _write(folder / path, data)


def fields(path: str, **changed: Any) -> Tamper:
    return lambda folder: _write(
        folder / path, json.dumps({**json.loads((folder / path).read_text()), **changed}).encode()
    )


def without(path: str) -> Tamper:
    return lambda folder: (folder / path).unlink()


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def built(header: Any, payload: bytes) -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + payload


def _value(value: float) -> Any:
    """The weights with one value in the middle another."""
    made = base_tensors()["weight"].copy()
    made[2, 2] = value
    return made


_GOOD = save(base_tensors())
_ENTRY = {"dtype": "F32", "shape": [5, 5], "data_offsets": [0, 100]}
_HALF = {"dtype": "F32", "shape": [5, 5], "data_offsets": [50, 150]}
_PICKLE = pickle.dumps({"weight": base_tensors()["weight"]})
# What is sent, by the check that must refuse it.
ATTACKS: dict[str, tuple[str, Tamper]] = {
    "a header of an exabyte": ("format", weights(struct.pack("<Q", 1 << 60) + _GOOD[8:])),
    "a header past the end": ("format", weights(struct.pack("<Q", len(_GOOD)) + _GOOD[8:])),
    "a header of 100,000 brackets": ("format", weights(built(b"[" * 100_000, bytes(100)))),
    "overlapping tensors": ("format", weights(built({"weight": _ENTRY, "b": _HALF}, bytes(150)))),
    "bytes between tensors": ("format", weights(built({"weight": _HALF}, bytes(150)))),
    "bytes after the tensors": ("format", weights(_GOOD + b"MZ")),
    "one name twice": (
        "format",
        weights(built(b'{"weight":%b,"weight":%b}' % ((json.dumps(_ENTRY).encode(),) * 2), bytes(100))),
    ),
    "a shape of 2^80 numbers": ("format", weights(built({"weight": {**_ENTRY, "shape": [1 << 40] * 2}}, bytes(100)))),
    "a truncated file": ("format", weights(_GOOD[:-4])),
    "a pickle named safetensors": ("format", weights(_PICKLE + bytes(100))),
    "a flipped bit in the header": ("tensors", weights(_GOOD.replace(b"weight", b"weighu"))),
    "NaN": ("finite", tensors(weight=_value(np.nan))),
    "infinity": ("finite", tensors(weight=_value(-np.inf))),
    "a flood of subnormals": ("subnormal", tensors(weight=np.full((5, 5), 1e-40, np.float32))),
    "another dtype": ("tensors", tensors(weight=base_tensors()["weight"].view(np.int32))),
    "another shape": ("tensors", tensors(weight=np.ones(25, np.float32))),
    "one tensor more": ("tensors", tensors(extra=np.ones(1, np.float32))),
    "one tensor less": ("tensors", weights(built({}, b""))),
    "one tensor less, and a header of its bytes": (
        "tensors",
        weights(built({"__metadata__": {"in its place": "x" * 200}}, b"")),
    ),
    "weights blown up": ("norm", tensors(weight=np.full((5, 5), 5, np.float32))),
    "weights zeroed": ("norm", tensors(weight=np.zeros((5, 5), np.float32))),
    "weights of 1e38": ("norm", tensors(weight=np.full((5, 5), 1e38, np.float32))),
    "NaN in a moment": ("finite", optimizer(exp_avg=np.full((5, 5), np.nan, np.float32))),
    "a negative square": ("moments", optimizer(exp_avg_sq=np.full((5, 5), -1e-9, np.float32))),
    "moments that clipping forbids": ("moments", optimizer(exp_avg=np.full((5, 5), 1.0, np.float32))),
    "a step that was not trained": ("step", optimizer(step=np.array(9, np.float32))),
    "a moment less": ("tensors", optimizer(exp_avg=None)),
    "no optimizer": ("files", without("optimizer.safetensors")),
    "no config": ("files", without("model/config.json")),
    "no state": ("files", without("state.json")),
    "the state of another task": ("state", fields("state.json", task_id="task_other")),
    "another recipe": ("state", fields("state.json", recipe_sha256="0" * 64)),
    "a step that is true": ("state", fields("state.json", step=True)),
    "state in pickle": ("json", text("state.json", pickle.dumps({"step": 3}))),
    "state of NaN": ("json", text("state.json", b'{"loss": NaN}')),
    "state of 10,000 lists": ("json", text("state.json", b"[" * 10_000)),
    "a name twice in the state": ("json", text("state.json", b'{"step": 3, "step": 4}')),
    "a config with code": ("config", fields("model/config.json", auto_map={"AutoModel": "evil.Model"})),
    "a config of another model": ("config", fields("model/config.json", hidden_size=6)),
    "a config that lacks the model": ("config", text("model/config.json", b"{}")),
}
# Seen in the list of files already: nothing is sent, and no checkpoint begins.
_BEFORE_SENDING = {"no optimizer", "no config", "no state", "one tensor less"}


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCoordinator]:
    with running_coordinator(tmp_path_factory.mktemp("hostile")) as running:
        yield running


@pytest.fixture(scope="module")
def admin(coordinator: RunningCoordinator) -> Iterator[Connection]:
    with coordinator.connect(coordinator.token("admin")) as connection:
        yield connection


@pytest.fixture(scope="module")
def run(admin: Connection, tmp_path_factory: pytest.TempPathFactory) -> pb.Run:
    """With a task for each attack, as one that was attacked is left alone for a while."""
    return make_run(admin, tmp_path_factory.mktemp("run"), clusters=len(ATTACKS) + 8)


@pytest.fixture
def worker(coordinator: RunningCoordinator, run: pb.Run) -> Iterator[RawWorker]:
    """A new one each time, as one whose work was rejected has to wait."""
    with contextlib.closing(RawWorker(coordinator, name="mallory")) as made:
        yield made


def _task(admin: Connection, run: pb.Run, lease: pb.Lease) -> pb.Task:
    status = admin.admin.GetRunStatus(ad.GetRunStatusRequest(run=run.id))
    return next(entry.task for entry in status.tasks if entry.task.id == lease.task_id)


def _hand_in(worker: RawWorker, lease: pb.Lease, folder: Path, tamper: Tamper, step: int = STEP) -> None:
    stamp(checkpoint_folder(folder), worker.specs[lease.task_id], step)
    tamper(folder)
    prepared = worker.prepare(lease, step, [spec.to_proto() for spec in describe(folder)])
    for upload in prepared.uploads:
        worker.transfer.upload(upload, folder / upload.file.path)
    worker.commit(lease, prepared.checkpoint.id)


def test_what_nobody_tampered_with_is_taken(worker: RawWorker, tmp_path: Path) -> None:
    _hand_in(worker, worker.lease(), tmp_path / "c", lambda folder: None)


@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_files_are_rejected_with_evidence(
    coordinator: RunningCoordinator, admin: Connection, run: pb.Run, worker: RawWorker, attack: str, tmp_path: Path
) -> None:
    check, tamper = ATTACKS[attack]
    lease = worker.lease()
    with pytest.raises(CheckpointRejected) as caught:
        _hand_in(worker, lease, tmp_path / "c", tamper)
    if attack in _BEFORE_SENDING:
        assert not list((coordinator.data_dir / "objects").rglob(f"{lease.task_id}/**/*.json"))
        return
    assert caught.value.metadata["check"] == check, caught.value.message
    task = _task(admin, run, lease)
    assert (task.state, task.attempts, task.committed_step) == (pb.TASK_STATE_PENDING, 1, 0)
    with pytest.raises(LeaseLost):
        worker.renew(lease)
    events = admin.admin.ListEvents(ad.ListEventsRequest(task_id=lease.task_id, page_size=100)).events
    rejected = next(event for event in events if event.kind == "checkpoint.rejected")
    assert rejected.worker_id == worker.id
    assert rejected.detail["evidence"]["check"] == check


def test_a_rejected_checkpoint_costs_its_worker_the_lease_and_the_task_nothing_that_was_good(
    coordinator: RunningCoordinator, admin: Connection, run: pb.Run, worker: RawWorker, tmp_path: Path
) -> None:
    lease = worker.lease()
    good = worker.save(lease, STEP, checkpoint_folder(tmp_path / "good"))
    with pytest.raises(CheckpointRejected) as first:
        _hand_in(worker, lease, tmp_path / "bad", tensors(weight=_value(np.nan)), STEP + 1)
    task = _task(admin, run, lease)
    assert (task.state, task.committed_step) == (pb.TASK_STATE_PENDING, good.checkpoint.step)
    # Asked again, and tried again, the answer stays.
    rejected_id = next(
        event.detail["checkpoint_id"]
        for event in admin.admin.ListEvents(ad.ListEventsRequest(task_id=task.id, page_size=100)).events
        if event.kind == "checkpoint.rejected"
    )
    with pytest.raises(CheckpointRejected) as again:
        worker.commit(lease, rejected_id)
    assert first.value.message in again.value.message
    with pytest.raises(LeaseLost):
        _hand_in(worker, lease, tmp_path / "other", lambda folder: None, STEP + 2)
    # Its worker has to wait, and housekeeping removes what it sent.
    assert not worker.acquire().HasField("lease")
    objects = coordinator.data_dir / "objects"
    deadline = time.monotonic() + 30
    while list(objects.rglob(f"{task.id}/*/s{STEP + 1:010d}/**/*.safetensors")):
        assert time.monotonic() < deadline, "the rejected objects are still there"
        time.sleep(0.1)
    assert list(objects.rglob(f"{task.id}/*/s{STEP:010d}/**/*.safetensors"))


def test_what_is_larger_than_a_model_can_be_is_refused_before_it_is_sent(worker: RawWorker) -> None:
    lease = worker.lease()
    files = [pb.FileSpec(path=path, size=200, sha256="0" * 64) for path in ("state.json", "model/config.json")]
    files += [pb.FileSpec(path="optimizer.safetensors", size=900, sha256="0" * 64)]
    for path, size in (("model/model.safetensors", 1 << 40), ("model/model.safetensors", 50), ("state.json", 1 << 30)):
        announced = [*(file for file in files if file.path != path), pb.FileSpec(path=path, size=size, sha256="0" * 64)]
        with pytest.raises(CheckpointRejected, match=path.partition("/")[0]):
            worker.prepare(lease, STEP, announced)
    worker.release(lease)


@pytest.mark.parametrize(
    "path", ["../state.json", "/etc/passwd", "model/../../x.json", "model/evil.py", "model/pytorch_model.bin", "a\\b"]
)
def test_path_tricks_in_a_checkpoint_are_refused(worker: RawWorker, path: str) -> None:
    lease = worker.lease()
    with pytest.raises(InvalidArgument, match="path"):
        worker.prepare(lease, STEP, [pb.FileSpec(path=path, size=9, sha256="0" * 64)])
    worker.release(lease)


def test_bytes_other_than_those_announced_do_not_reach_the_store(worker: RawWorker, tmp_path: Path) -> None:
    lease = worker.lease()
    folder = checkpoint_folder(tmp_path / "c")
    stamp(folder, worker.specs[lease.task_id], STEP)
    prepared = worker.prepare(lease, STEP, [spec.to_proto() for spec in describe(folder)])
    flipped = bytearray((folder / "model" / "model.safetensors").read_bytes())
    flipped[-1] ^= 1
    (folder / "model" / "model.safetensors").write_bytes(bytes(flipped))
    upload = next(upload for upload in prepared.uploads if upload.file.path == "model/model.safetensors")
    with pytest.raises(IntegrityError):
        worker.transfer.upload(upload, folder / upload.file.path)
    worker.release(lease)
