"""Calls as fast as they go, or at a fixed rate, and how long each took."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np


async def timed(action: Awaitable[Any], into: list[float]) -> Any:
    started = time.perf_counter()
    result = await action
    into.append(time.perf_counter() - started)
    return result


async def saturate(
    make: Callable[[int], Awaitable[Any]], *, seconds: float, in_flight: int
) -> tuple[float, list[float]]:
    """As many calls as go, `in_flight` at a time: (calls a second, latencies)."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds
    count = iter(range(1 << 60))

    async def one() -> None:
        while time.perf_counter() < end:
            await timed(make(next(count)), latencies)

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(in_flight)))
    return len(latencies) / (time.perf_counter() - started), latencies


async def paced(make: Callable[[int], Awaitable[Any]], *, rate: float, seconds: float) -> list[float]:
    """Calls at a fixed rate, whatever their latency; latencies count from when a call was due."""
    latencies: list[float] = []
    started = time.perf_counter()
    pending = set()

    async def one(number: int, due: float) -> None:
        await make(number)
        latencies.append(time.perf_counter() - due)

    for number in range(int(rate * seconds)):
        due = started + number / rate
        delay = due - time.perf_counter()
        if delay > 0:
            await asyncio.sleep(delay)
        task = asyncio.create_task(one(number, due))
        pending.add(task)
        task.add_done_callback(pending.discard)
    await asyncio.gather(*pending)
    return latencies


def p99(latencies: list[float]) -> float:
    """In milliseconds, of latencies in seconds."""
    return 1000 * float(np.percentile(latencies, 99))
