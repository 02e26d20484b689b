"""The device that computes: by its name, what it is, and values on their way from it."""

from __future__ import annotations

import torch

from cbtm_common.errors import InvalidArgument


def open_device(name: str) -> torch.device:
    """Raises InvalidArgument for a device that this machine does not have."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidArgument(f"device: {name!r} cannot be used here: {error}", field="device") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def seed_draws(device: torch.device, seed: int) -> None:
    """Seeds what is drawn from torch's global state on this device and the host."""
    # torch.manual_seed would seed every kind of device, and takes a millisecond for those that are absent.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


class PendingValues:
    """(loss, gradient norm) of a step, on their way to the host."""

    def __init__(self, values: torch.Tensor, step: int) -> None:
        self.step = step
        self._event: torch.cuda.Event | None = None
        self._host = values
        if values.device.type == "cuda":
            self._host = torch.empty(2, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> tuple[float, float]:
        if self._event is not None:
            self._event.synchronize()
        loss, norm = self._host.tolist()
        return loss, norm
