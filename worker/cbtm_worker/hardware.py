"""What this machine has, as the coordinator is told."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

from cbtm_api.v1 import resources_pb2 as pb
from cbtm_common.errors import InvalidArgument, InvalidState


def choose_device(asked: str | None) -> str:
    """The torch device to train on. Raises InvalidArgument when the one asked for is not there."""
    import torch

    if asked is None:
        if torch.cuda.is_available():
            return "cuda:0"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise InvalidArgument(
            f"device: {asked!r} is not a device; use cpu, cuda:0, cuda:1, …", field="device"
        ) from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise InvalidArgument(f"device: cannot train on {asked!r}; use cpu, cuda:0, cuda:1, …", field="device")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            found = ", ".join(f"cuda:{i}" for i in range(count)) or "no CUDA device; use --device cpu"
            raise InvalidArgument(f"device: there is no {asked}; found: {found}", field="device")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise InvalidArgument("device: there is no mps here; use --device cpu", field="device")
    return asked


def choose_devices(asked: str | None) -> tuple[str, ...]:
    """The torch devices that train one task together: those asked for, separated by commas, or every GPU there is.

    Raises InvalidArgument when one is not there, or they are not of one kind.
    """
    import torch

    if asked is None and torch.cuda.is_available():
        return tuple(f"cuda:{index}" for index in range(torch.cuda.device_count()))
    devices = tuple(choose_device(part.strip()) for part in asked.split(",")) if asked else (choose_device(None),)
    if len({torch.device(device).type for device in devices}) > 1:
        raise InvalidArgument(f"device: {asked} are not of one kind; start a worker for each kind", field="device")
    if devices[0] != "cpu" and len(set(devices)) < len(devices):
        raise InvalidArgument(f"device: {asked} names a device twice", field="device")
    return devices


def describe(device: str, cache_dir: Path) -> pb.Hardware:
    """`device` must exist. Raises InvalidState when the worker's own packages are not installed."""
    try:
        import psutil
    except ImportError as error:
        raise InvalidState("a worker needs its packages: pip install 'cbtm[worker]'") from error
    import torch

    hardware = pb.Hardware(
        device_type=torch.device(device).type,
        cpu_count=os.cpu_count() or 1,
        memory_bytes=psutil.virtual_memory().total,
        free_disk_bytes=shutil.disk_usage(cache_dir).free,
        platform=platform.platform()[:100],
        torch_version=torch.__version__,
    )
    if hardware.device_type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware.device_name = properties.name
        hardware.device_memory_bytes = properties.total_memory
        hardware.device_count = torch.cuda.device_count()
    else:
        hardware.device_name = platform.processor() or platform.machine()
        hardware.device_memory_bytes = psutil.virtual_memory().available
        hardware.device_count = 1
    return hardware
