"""What is held on which device, and what must give way: bookkeeping alone, no tensor is touched here.

An expert has a home among the devices that compute: the one it was given, or the one with most of its budget left when
it was first admitted. Where a home is full, the least recently used expert there gives way: to the CPU's memory while
the budget for offloaded experts lasts, else it is dropped, to be read from its memory-mapped file when needed again.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from cbtm_common.errors import InvalidArgument, ResourceExhausted

# The place of offloaded experts. Not "cpu", which may be a device that computes.
OFFLOAD = "offload"
_UNITS = {"": 1, "B": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for unit, base in (("B", 1000), ("iB", 1024))
}


@dataclass(frozen=True)
class Move:
    """`key` is to be on device `to`, or in OFFLOAD, or nowhere (None)."""

    key: Hashable
    to: str | None


class MemoryBudget:
    """Bytes of weights by device; None: no limit. `max_experts` and `max_bytes` count over all devices that compute."""

    def __init__(
        self,
        devices: Mapping[str, int | None],
        *,
        offload: int | None = 0,
        max_experts: int | None = None,
        max_bytes: int | None = None,
    ) -> None:
        for field, limit in (("max_experts", max_experts), ("max_bytes", max_bytes)):
            if limit is not None and limit < 1:
                raise InvalidArgument(f"{field}: {limit} is under 1", field=field)
        self._devices = dict(devices)
        self._offload = offload
        self._max_experts = max_experts
        self._max_bytes = max_bytes
        # Key -> (place, bytes), least recently used first.
        self._held: OrderedDict[Hashable, tuple[str, int]] = OrderedDict()
        # Key -> (device, bytes); kept when an expert is dropped, so that it comes back to the caches made there.
        self._homes: dict[Hashable, tuple[str, int]] = {}

    @property
    def resident(self) -> tuple[Hashable, ...]:
        """On devices that compute, least recently used first."""
        return tuple(key for key, (place, _) in self._held.items() if place != OFFLOAD)

    @property
    def offloaded(self) -> tuple[Hashable, ...]:
        return tuple(key for key, (place, _) in self._held.items() if place == OFFLOAD)

    def admit(self, key: Hashable, size: int, *, name: str, home: str | None = None) -> list[Move]:
        """What to do, in order, so that `key`, of `size` bytes, is on its home; nothing if it is there already.

        Raises ResourceExhausted when it alone exceeds a budget.
        """
        if self.touch(key):
            return []
        home = self._home(key, size, home)
        limit = self._devices[home]
        for field, allowed in (("max_memory", limit), ("max_bytes", self._max_bytes)):
            if allowed is not None and size > allowed:
                where = f" of {home}" if field == "max_memory" else ""
                raise ResourceExhausted(
                    f"{field}: {name} takes {size:,} bytes, over the budget{where} of {allowed:,}; raise it, or choose "
                    "a smaller dtype"
                )
        # Its own place among the offloaded is free for what it drives out.
        self._held.pop(key, None)
        moves: list[Move] = []
        while limit is not None and self._bytes(home) + size > limit:
            moves += self._evict(home)
        while self._max_experts is not None and len(self.resident) >= self._max_experts:
            moves += self._evict(None)
        while self._max_bytes is not None and sum(map(self._bytes, self._devices)) + size > self._max_bytes:
            moves += self._evict(None)
        self._held[key] = (home, size)
        return [*moves, Move(key, home)]

    def touch(self, key: Hashable) -> bool:
        """Whether it is on a device that computes; if so, it is now the most recently used."""
        if self._held.get(key, (OFFLOAD, 0))[0] == OFFLOAD:
            return False
        self._held.move_to_end(key)
        return True

    def forget(self, key: Hashable) -> None:
        """It is held nowhere, and its home is open."""
        self._held.pop(key, None)
        self._homes.pop(key, None)

    def _home(self, key: Hashable, size: int, given: str | None) -> str:
        if key not in self._homes:
            self._homes[key] = (given or self._roomiest(size), size)
        return self._homes[key][0]

    def _roomiest(self, size: int) -> str:
        """The device with the least share of its budget given to experts so far; of equals, the first."""
        given = dict.fromkeys(self._devices, 0)
        for place, taken in self._homes.values():
            given[place] += taken
        limits = [limit for limit in self._devices.values() if limit is not None]
        # Devices without a limit among some with one are as large as the largest.
        default = max(limits, default=1)
        fitting = [d for d, limit in self._devices.items() if limit is None or size <= limit] or list(self._devices)
        return min(fitting, key=lambda d: (given[d] + size) / max(1, self._devices[d] or default))

    def _bytes(self, place: str) -> int:
        return sum(size for at, size in self._held.values() if at == place)

    def _evict(self, device: str | None) -> list[Move]:
        """Moves the least recently used expert off `device`, or off any that computes."""
        key, size = next(
            (key, size)
            for key, (place, size) in self._held.items()
            if place == device or (device is None and place != OFFLOAD)
        )
        del self._held[key]
        if self._offload is not None and size > self._offload:
            return [Move(key, None)]
        moves = []
        while self._offload is not None and self._bytes(OFFLOAD) + size > self._offload:
            moves += [Move(oldest := self.offloaded[0], None)]
            del self._held[oldest]
        self._held[key] = (OFFLOAD, size)
        return [*moves, Move(key, OFFLOAD)]


def parse_memory(max_memory: Mapping[int | str, int | str]) -> dict[str, int]:
    """Bytes by device name: a number as a key is that GPU, "10GiB" or "500MB" a size, as in transformers."""
    parsed = {}
    for device, size in max_memory.items():
        name = f"cuda:{device}" if isinstance(device, int) else str(device)
        if isinstance(size, str):
            found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", size)
            unit = _UNITS.get(found[2]) if found else None
            try:
                size = -1 if found is None or unit is None else int(float(found[1]) * unit)
            except ValueError:
                size = -1
        if size < 1:
            raise InvalidArgument(
                f"max_memory: {max_memory[device]!r} for {name} is no size; give bytes, or a text such as '10GiB'",
                field="max_memory",
            )
        parsed[name] = size
    if not parsed:
        raise InvalidArgument("max_memory: it names no device", field="max_memory")
    return parsed
