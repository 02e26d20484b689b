"""The check of a checkpoint's objects: once at a time, never for other files than were announced, never in the way."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cbtm_common.errors import CheckpointRejected, IntegrityError, NotFound
from cbtm_common.files import FileSpec
from cbtm_coordinator.services.commit import Verifier
from cbtm_coordinator.storage import LocalStore, ObjectStore, StorageConfig, open_object_store
from cbtm_coordinator.structure.architecture import Size

PART = 1 << 20
LONG = 20.0


class Gate:
    """A store that holds the reader of `stat` until it is opened, and counts who came."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.opened = threading.Event()
        self.entered = threading.Semaphore(0)
        self.checks = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    def stat(self, key: str) -> object:
        self.checks += 1
        self.entered.release()
        assert self.opened.wait(LONG)
        return self._store.stat(key)


class Anything:
    """An inspection that has no objection to any bytes."""

    def reader(self, file: FileSpec) -> Anything:
        return self

    def feed(self, chunk: bytes) -> None: ...

    def finish(self) -> dict[str, Size]:
        return {"weight": Size(1.0)}


class Objection(Anything):
    def feed(self, chunk: bytes) -> None:
        raise CheckpointRejected("no such weights")


begin = Anything


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_object_store(StorageConfig(location=f"local:{tmp_path / 'objects'}", signing_key=b"k" * 32))


@pytest.fixture
def gate(store: ObjectStore) -> Gate:
    return Gate(store)


@pytest.fixture
def make(gate: Gate) -> Iterator[Callable[..., Verifier]]:
    made: list[Verifier] = []

    def verifier(objects: object, **settings: int) -> Verifier:
        made.append(Verifier(objects, part_size=PART, **settings))  # type: ignore[arg-type]  # a gated store
        return made[-1]

    yield verifier
    gate.opened.set()
    for one in made:
        assert one.close(LONG)


def put(store: ObjectStore, key: str, content: bytes) -> FileSpec:
    store.put_bytes(key, content)
    return FileSpec(path="a", key=key, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def test_what_landed_is_checked(store: ObjectStore, make: Callable[..., Verifier]) -> None:
    assert make(store).wait("ckpt_1", [put(store, "runs/a", b"one"), put(store, "runs/b", b"two")], begin, LONG)


def test_a_file_that_is_missing_is_named(store: ObjectStore, make: Callable[..., Verifier]) -> None:
    missing = FileSpec(path="state.json", key="runs/none", size=1, sha256="0" * 64)
    with pytest.raises(NotFound, match=r"state\.json"):
        make(store).wait("ckpt_1", [missing], begin, LONG)


def test_wrong_bytes_are_removed_so_that_the_right_ones_can_come(
    store: ObjectStore, make: Callable[..., Verifier]
) -> None:
    verifier = make(store)
    right = put(store, "runs/a", b"right")
    store.put_bytes("runs/a", b"wrong")
    with pytest.raises(IntegrityError):
        verifier.wait("ckpt_1", [right], begin, LONG)
    assert store.stat("runs/a") is None
    put(store, "runs/a", b"right")
    assert verifier.wait("ckpt_1", [right], begin, LONG)


def test_a_content_that_is_objected_to_stays_until_its_checkpoint_is_rejected(
    store: ObjectStore, make: Callable[..., Verifier]
) -> None:
    file = put(store, "runs/a", b"nonsense")
    with pytest.raises(CheckpointRejected):
        make(store).wait("ckpt_1", [file], Objection, LONG)
    assert store.stat("runs/a") is not None


def test_damage_on_the_way_is_no_objection_to_the_worker(store: ObjectStore, make: Callable[..., Verifier]) -> None:
    """The disk lies about what it was told: the bytes are not what was announced, and can be sent again."""
    file = put(store, "runs/a", b"good")
    assert isinstance(store, LocalStore)
    store.path_of("runs/a").write_bytes(b"evil")
    with pytest.raises(IntegrityError):
        make(store).wait("ckpt_1", [file], Objection, LONG)


def test_a_store_that_does_not_answer_keeps_nobody_from_closing(
    store: ObjectStore, gate: Gate, make: Callable[..., Verifier]
) -> None:
    verifier = make(gate, threads=1)
    for name in ("a", "b"):
        assert verifier.wait(f"ckpt_{name}", [put(store, f"runs/{name}", b"one")], begin, 0) is None
    assert gate.entered.acquire(timeout=LONG)
    assert not verifier.close(0.05)
    gate.opened.set()
    assert verifier.close(LONG)
    assert gate.checks == 1, "the one that waited is not begun"


def test_a_long_check_is_asked_for_again_and_made_once(
    store: ObjectStore, gate: Gate, make: Callable[..., Verifier]
) -> None:
    verifier = make(gate)
    files = [put(store, "runs/a", b"one")]
    assert verifier.wait("ckpt_1", files, begin, 0) is None
    assert verifier.wait("ckpt_1", files, begin, 0) is None
    gate.opened.set()
    assert verifier.wait("ckpt_1", files, begin, LONG)
    # `verify` looks once; a small file has no upload to finish.
    assert gate.checks == 1


def test_files_announced_anew_are_not_vouched_for_by_the_check_of_the_old_ones(
    store: ObjectStore, gate: Gate, make: Callable[..., Verifier]
) -> None:
    verifier = make(gate)
    old = [put(store, "runs/a", b"one")]
    new = [FileSpec(path="a", key="runs/a", size=3, sha256=hashlib.sha256(b"two").hexdigest())]
    assert verifier.wait("ckpt_1", old, begin, 0) is None
    assert verifier.wait("ckpt_1", new, begin, LONG) is None, "the old check still runs"
    gate.opened.set()
    while not verifier.wait("ckpt_1", old, begin, LONG):
        pass
    with pytest.raises(IntegrityError):
        verifier.wait("ckpt_1", new, begin, LONG)


def test_few_calls_wait_and_the_others_come_back_at_once(
    store: ObjectStore, gate: Gate, make: Callable[..., Verifier]
) -> None:
    verifier = make(gate, waiters=1)
    files = [put(store, "runs/a", b"one")]
    outcome: list[bool] = []
    waiting = threading.Thread(target=lambda: outcome.append(bool(verifier.wait("ckpt_1", files, begin, LONG))))
    waiting.start()
    assert gate.entered.acquire(timeout=LONG)
    # The check runs, so the thread that began it waits or is about to: whichever of the two calls is first to wait,
    # the other has its answer without the gate being opened.
    answered = threading.Thread(target=lambda: outcome.append(bool(verifier.wait("ckpt_1", files, begin, LONG))))
    answered.start()
    while waiting.is_alive() and answered.is_alive():
        waiting.join(0.005)
    assert outcome == [False]
    gate.opened.set()
    waiting.join(LONG)
    answered.join(LONG)
    assert outcome == [False, True]
