"""How steps are computed here, so that whoever computes them in the same way can expect the same bits."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch


@dataclass(frozen=True, kw_only=True)
class Computation:
    """As `cbtm_api.v1.Computation` has it: equal ones give equal bits on a CPU."""

    device_type: str
    # Device, instruction set, version of torch, how many devices sums are parted among, whether they share the model,
    # whether it is compiled.
    environment: str
    precision: str
    micro_batch: int
    # Of torch on a CPU, where sums are parted among them; 0 elsewhere.
    threads: int

    @classmethod
    def on(
        cls,
        device: torch.device,
        *,
        precision: str,
        micro_batch: int,
        devices: int = 1,
        sharded: bool = False,
        compiled: bool = False,
    ) -> Computation:
        return cls(
            device_type=device.type,
            environment=_environment(device)
            + (f", {devices} devices" if devices > 1 else "")
            + (", sharded" if sharded else "")
            + (", compiled" if compiled else ""),
            precision=precision,
            micro_batch=micro_batch,
            threads=torch.get_num_threads() if device.type == "cpu" else 0,
        )


def computes_bf16(device: torch.device) -> bool:
    """Whether the device itself computes in bf16."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@cache
def _environment(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, torch {torch.__version__}"
    if device.type == "cpu":
        return f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
    return f"{_processor()}, {device.type}, torch {torch.__version__}"


def _processor() -> str:
    """Its libraries choose kernels by the model, not by the instruction set alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = next((line for line in lines if line.startswith("model name")), "")
    return named.partition(":")[2].strip() or platform.processor() or platform.machine()
