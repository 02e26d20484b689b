"""What a task reads: waits, retries and refusals."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.cache import ContentCache
from cbtm_common.errors import Cancelled, CbtmError, IntegrityError, InternalError, InvalidArgument, Unavailable
from cbtm_common.rpc import RetryPolicy
from cbtm_worker import inputs as module
from cbtm_worker.heartbeat import Heartbeat
from cbtm_worker.inputs import Inputs, Unfit, check_model, disk_refusal
from cbtm_worker.session import Held, Session
from tests.support.scripted_coordinator import POLICY, ScriptedCoordinator, file_of

HELD = Held(lease_id="lease_1", epoch=7)

WEIGHTS = save({"weight": np.ones(3, np.float32)})


class Desk:
    """Inputs against a scripted coordinator whose task starts from a model of two files."""

    def __init__(self, root: Path, coordinator: ScriptedCoordinator, session: Session) -> None:
        self.coordinator = coordinator
        self.folder = root / "task_1"
        self.folder.mkdir()
        self.stop = threading.Event()
        self.said: list[str] = []
        self.bytes = 0
        self.transfer = coordinator.transfer()
        self.cache = ContentCache(root / "files")
        self.inputs = Inputs(
            session,
            HELD,
            Heartbeat(session, HELD, POLICY),
            self.cache,
            self.transfer,
            cancelled=self.stop,
            on_bytes=self._count,
            say=self.said.append,
        )

    def _count(self, count: int) -> None:
        self.bytes += count

    def put(self, **files: bytes) -> list[pb.FileSpec]:
        keys = {f"base/{name.replace('__', '.')}": data for name, data in files.items()}
        self.coordinator.objects.update(keys)
        return [file_of(key, data) for key, data in keys.items()]

    def spec(self, **fields: Any) -> ws.TaskSpec:
        return ws.TaskSpec(task=pb.Task(id="task_1", total_steps=10), policy=POLICY, **fields)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    monkeypatch.setattr(module, "_RETRY", RetryPolicy(initial=0.001, maximum=0.001))
    with ScriptedCoordinator() as coordinator, coordinator.connect() as connection:
        made = Desk(tmp_path, coordinator, Session(connection))
        yield made
        made.cache.close()
        made.transfer.close()


def test_a_task_from_the_beginning_gets_its_base_model_and_nothing_that_could_be_code(desk: Desk) -> None:
    files = desk.put(config__json=b'{"model_type": "llama"}', model__safetensors=WEIGHTS, evil__py=b"import os")
    got = desk.inputs.fetch(desk.spec(base_model_files=files), desk.folder, None)
    assert got.resume_dir is None
    assert sorted(p.name for p in got.model_dir.iterdir()) == ["config.json", "model.safetensors"]
    assert desk.bytes == len(b'{"model_type": "llama"}') + len(WEIGHTS)


def test_a_task_under_way_gets_its_checkpoint_in_a_clean_folder(desk: Desk) -> None:
    stale = desk.folder / "from" / "model" / "model-00002-of-00002.safetensors"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of an earlier checkpoint")
    files = desk.put(state__json=b"{}", optimizer__safetensors=WEIGHTS)
    spec = desk.spec(resume_from=pb.Checkpoint(id="ckpt_1", step=4, files=files))
    got = desk.inputs.fetch(spec, desk.folder, None)
    assert got.resume_dir == desk.folder / "from"
    assert sorted(p.name for p in got.resume_dir.iterdir()) == ["optimizer.safetensors", "state.json"]


def test_a_checkpoint_on_this_disk_needs_no_download(desk: Desk) -> None:
    files = desk.put(state__json=b"{}")
    local = desk.folder / "s0000000006"
    spec = desk.spec(resume_from=pb.Checkpoint(id="ckpt_1", step=4, files=files))
    assert desk.inputs.fetch(spec, desk.folder, local).resume_dir == local
    assert desk.coordinator.requests("PrepareDownload") == []


def test_a_coordinator_that_is_away_is_waited_for_and_said_once(desk: Desk) -> None:
    desk.coordinator.errors["PrepareDownload"] = [Unavailable("going down")] * 5
    files = desk.put(config__json=b"{}")
    desk.inputs.fetch(desk.spec(base_model_files=files), desk.folder, None)
    assert desk.said == ["waiting, to try again: going down"]


@pytest.mark.parametrize("error", [IntegrityError("other bytes"), InternalError("a defect")])
def test_wrong_bytes_and_defects_are_tried_three_times(desk: Desk, error: CbtmError) -> None:
    files = desk.put(config__json=b"{}")
    desk.coordinator.errors["PrepareDownload"] = [error] * 2
    desk.inputs.fetch(desk.spec(base_model_files=files), desk.folder, None)
    more = desk.put(other__json=b"[]")
    desk.coordinator.errors["PrepareDownload"] = [error] * 3
    with pytest.raises(type(error)):
        desk.inputs.fetch(desk.spec(base_model_files=more), desk.folder, None)


def test_a_volunteer_who_leaves_does_not_wait_for_the_download(desk: Desk) -> None:
    desk.stop.set()
    with pytest.raises(Cancelled):
        desk.inputs.fetch(desk.spec(), desk.folder, None)


def test_a_model_with_code_of_its_own_is_refused(desk: Desk) -> None:
    files = desk.put(config__json=json.dumps({"auto_map": {"AutoModel": "evil.Model"}}).encode())
    with pytest.raises(InvalidArgument, match=r"config\.json: names code of its own \(auto_map\)"):
        desk.inputs.fetch(desk.spec(base_model_files=files), desk.folder, None)


def test_what_a_task_used_may_be_dropped_after_it(desk: Desk) -> None:
    files = desk.put(config__json=b"{}")
    desk.coordinator.errors["PrepareDownload"] = [Unavailable("away")]
    desk.inputs.fetch(desk.spec(base_model_files=files), desk.folder, None)
    assert desk.cache._pinned
    desk.inputs.release()
    assert not desk.cache._pinned


def test_a_disk_that_can_never_hold_a_task_makes_it_unfit(desk: Desk) -> None:
    files = [pb.FileSpec(path="model.safetensors", key="k", size=10**18, sha256="0" * 64)]
    with pytest.raises(Unfit, match="this whole disk has"):
        desk.inputs.fetch(desk.spec(base_model_files=files), desk.folder, None)


def test_a_disk_must_hold_the_inputs_and_two_checkpoints() -> None:
    assert disk_refusal(total_bytes=1100, input_bytes=500, checkpoint_bytes=300) is None
    refusal = disk_refusal(total_bytes=1099, input_bytes=500, checkpoint_bytes=300)
    assert refusal == "the task takes about 1.1 KiB, and this whole disk has 1.1 KiB"


@pytest.mark.parametrize("text", ['{"auto_map": {}}', '{"model_type": "gpt2"}', "[]"])
def test_configs_that_name_no_code_are_taken(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    check_model(tmp_path)


def test_a_config_that_is_no_json_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"config\.json"):
        check_model(tmp_path)
