"""Choosing a device: the machine's torch is stood in for, so that every machine can be had."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cbtm_common.errors import InvalidArgument, InvalidState
from cbtm_worker.hardware import choose_device, choose_devices, describe


def machine(monkeypatch: pytest.MonkeyPatch, *, cuda: int = 0, mps: bool = False) -> None:
    def device(name: str) -> Any:
        kind, _, index = name.partition(":")
        if kind not in ("cpu", "cuda", "mps", "meta"):
            raise RuntimeError(f"Expected one of cpu, cuda, ... device type at start of device string: {name}")
        return SimpleNamespace(type=kind, index=int(index) if index else None)

    torch = SimpleNamespace(
        device=device,
        __version__="2.13.0",
        cuda=SimpleNamespace(
            is_available=lambda: cuda > 0,
            device_count=lambda: cuda,
            get_device_properties=lambda name: SimpleNamespace(name="a GPU", total_memory=80 << 30),
        ),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: mps)),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"), [(2, False, "cuda:0"), (0, True, "mps"), (1, True, "cuda:0"), (0, False, "cpu")]
)
def test_a_gpu_is_taken_if_there_is_one(monkeypatch: pytest.MonkeyPatch, cuda: int, mps: bool, chosen: str) -> None:
    machine(monkeypatch, cuda=cuda, mps=mps)
    assert choose_device(None) == chosen


@pytest.mark.parametrize("asked", ["cpu", "cuda", "cuda:1"])
def test_the_device_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    machine(monkeypatch, cuda=2)
    assert choose_device(asked) == asked


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("cuda:2", "there is no cuda:2; found: cuda:0, cuda:1"),
        ("mps", "there is no mps here"),
        ("gpu0", "'gpu0' is not a device"),
        ("meta", "cannot train on 'meta'"),
    ],
)
def test_a_device_that_is_not_there_is_refused_with_what_is(
    monkeypatch: pytest.MonkeyPatch, asked: str, said: str
) -> None:
    machine(monkeypatch, cuda=2)
    with pytest.raises(InvalidArgument, match=said) as caught:
        choose_device(asked)
    assert caught.value.field == "device"


@pytest.mark.parametrize(
    ("cuda", "asked", "chosen"),
    [
        (3, None, ("cuda:0", "cuda:1", "cuda:2")),
        (0, None, ("cpu",)),
        (3, "cuda:2, cuda:0", ("cuda:2", "cuda:0")),
        (3, "cuda:1", ("cuda:1",)),
        (0, "cpu,cpu", ("cpu", "cpu")),
    ],
)
def test_every_gpu_trains_or_those_asked_for(
    monkeypatch: pytest.MonkeyPatch, cuda: int, asked: str | None, chosen: tuple[str, ...]
) -> None:
    machine(monkeypatch, cuda=cuda)
    assert choose_devices(asked) == chosen


@pytest.mark.parametrize(
    ("asked", "said"),
    [("cuda:0,cpu", "not of one kind"), ("cuda:1,cuda:1", "twice"), ("cuda:0,cuda:5", "there is no cuda:5")],
)
def test_devices_that_cannot_train_together_are_refused(monkeypatch: pytest.MonkeyPatch, asked: str, said: str) -> None:
    machine(monkeypatch, cuda=2)
    with pytest.raises(InvalidArgument, match=said) as caught:
        choose_devices(asked)
    assert caught.value.field == "device"


def test_without_cuda_the_remedy_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    with pytest.raises(InvalidArgument, match="use --device cpu"):
        choose_device("cuda:0")


def test_a_gpu_is_described_by_its_own_memory_and_a_cpu_by_the_machines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine(monkeypatch, cuda=2)
    gpu, cpu = describe("cuda:0", tmp_path), describe("cpu", tmp_path)
    assert (gpu.device_type, gpu.device_name, gpu.device_memory_bytes) == ("cuda", "a GPU", 80 << 30)
    assert gpu.device_count == 2
    assert cpu.device_type == "cpu"
    assert 0 < cpu.device_memory_bytes <= cpu.memory_bytes
    assert cpu.cpu_count >= 1
    assert cpu.free_disk_bytes > 0
    assert cpu.torch_version == "2.13.0"


def test_a_missing_package_is_said_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(InvalidState, match=r"pip install 'cbtm\[worker\]'"):
        describe("cpu", tmp_path)
