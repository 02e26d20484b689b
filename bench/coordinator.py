"""What one coordinator carries: simulated workers over real gRPC to a real process and a real PostgreSQL.

    python -m bench.coordinator [--quick] [--database sqlite] [--insecure]

Renewals at the pace of 10,000 live leases, renewals as fast as they go, full cycles (acquire, prepare, commit,
release), the coordinator's memory, and the cost of each call as the registry grows. PostgreSQL runs with fsync on.
The load generator shares the machine's cores with what it measures. What a cycle uploads is put into the store beside
the coordinator, as an S3 server takes it, and verified by the coordinator; and once more through the coordinator's own
HTTP endpoint. The published figure beside the cycles is BOINC's: 8.8 million tasks a day on one server, 102 a second.
"""

from __future__ import annotations

import argparse
import asyncio
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil

from bench.pacing import p99, paced, saturate, timed
from bench.processes import running_coordinator
from bench.puts import Puts, Send, placing
from bench.report import Report
from bench.simulated_workers import RENEW_SECONDS, Load, Simulated, Target, cycle, fill, make_workers, target_of
from cbtm_coordinator.store import Store
from tests.support.postgres import running_postgres

# Calls in flight while as many as possible are made.
SATURATION = 64
CYCLES_IN_FLIGHT = 32


async def measure(report: Report, store: Store, target: Target, pid: int, *, workers: int, seconds: float) -> None:
    name = f"{workers:,} live leases"
    load = Load(target)
    simulated = make_workers(store, workers, target.data_dir)
    acquire_latencies: list[float] = []
    held: list[Simulated] = []
    for start in range(0, workers, SATURATION):
        batch = [timed(load.acquire(w), acquire_latencies) for w in simulated[start : start + SATURATION]]
        held += await asyncio.gather(*batch)
    rate = workers / RENEW_SECONDS
    latencies = await paced(lambda n: load.renew(held[n % workers], n), rate=rate, seconds=seconds)
    small = "sqlite" in str(store.engine.url)
    bar = 50 if small else 100
    report.add(f"{name}: p99 of renewals at {rate:.0f}/s", p99(latencies), "ms", bar=bar, sense="at most")
    report.add(f"{name}: p50 of renewals", 1000 * float(np.median(latencies)), "ms")
    speed, _ = await saturate(lambda n: load.renew(held[n % workers], n), seconds=seconds, in_flight=SATURATION)
    report.add("renewals, as many as go", speed, "/s", bar=None if small else 1000)
    fill(store, open_tasks=CYCLES_IN_FLIGHT * 4, name=f"cycles-{workers}")
    cyclers = make_workers(store, CYCLES_IN_FLIGHT * 2, target.data_dir)
    free = asyncio.Queue[Simulated]()
    for worker in cyclers:
        free.put_nowait(worker)
    puts = Puts(target.http, target.trust)
    for how, send in (
        ("", placing(target.data_dir / "objects")),
        (", with the upload through its HTTP endpoint", puts),
    ):

        async def one(_: int, send: Send = send) -> None:
            worker = await free.get()
            await cycle(load, send, worker)
            free.put_nowait(worker)

        speed, _ = await saturate(one, seconds=seconds, in_flight=CYCLES_IN_FLIGHT)
        least = None if small or how else 150
        report.add(f"full cycles (acquire, prepare, commit, release){how}", speed, "/s", bar=least)
        report.add(f"the same against BOINC's published 102/s{how}", speed / 102, "x")
    puts.close()
    memory = psutil.Process(pid).memory_info().rss / 2**20
    report.add("coordinator's memory", memory, "MiB", bar=1024, sense="at most")
    await load.close()


async def curve(report: Report, store: Store, target: Target, sizes: list[int], seconds: float) -> None:
    """Acquire and renew as the number of tasks grows: the cost should not."""
    load = Load(target)
    costs: dict[str, list[float]] = {"acquire": [], "renew": []}
    total = 0
    for size in sizes:
        fill(store, open_tasks=size - total, name=f"curve-{size}")
        total = size
        workers = make_workers(store, 50, target.data_dir)
        acquired: list[float] = []
        held = [await timed(load.acquire(w), acquired) for w in workers]
        renewed: list[float] = []
        for number in range(200):
            await timed(load.renew(held[number % len(held)], number), renewed)
        for name, values in (("acquire", acquired), ("renew", renewed)):
            costs[name].append(1000 * float(np.median(values)))
            report.add(f"{name} with {size:,} tasks: p50, one at a time", costs[name][-1], "ms")
    for name, values in costs.items():
        ratio = values[-1] / values[0]
        report.add(f"{name}: {sizes[-1]:,} tasks against {sizes[0]:,}", ratio, "x", bar=1.5, sense="at most")
    await load.close()


def run(report: Report, stack: ExitStack, database: str, *, quick: bool, insecure: bool) -> None:
    scratch = Path(stack.enter_context(TemporaryDirectory()))
    url = ""
    if database == "postgresql":
        url = stack.enter_context(running_postgres(durable=True)).url()
    environment = {"CBTM_DATABASE_URL": url} if url else {}
    environment |= {"CBTM_INSECURE": "1"} if insecure else {}
    coordinator = stack.enter_context(running_coordinator(scratch / "coordinator", environment))
    store = Store(url or f"sqlite:///{scratch / 'coordinator' / 'registry.db'}")
    stack.callback(store.close)
    target = target_of(coordinator)
    workers = 1000 if database == "sqlite" or quick else 10_000
    seconds = 4.0 if quick else 30.0
    fill(store, open_tasks=workers, name="main")
    asyncio.run(measure(report, store, target, coordinator.pid, workers=workers, seconds=seconds))
    if database == "postgresql":
        sizes = [100, 1000, 10_000] if quick else [100, 1000, 10_000, 100_000]
        asyncio.run(curve(report, store, target, sizes, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer leases, under 60 s")
    parser.add_argument("--database", choices=["postgresql", "sqlite"], default="postgresql")
    parser.add_argument("--insecure", action="store_true", help="without TLS, to compare")
    options = parser.parse_args()
    report = Report(bench=f"coordinator ({options.database})")
    with ExitStack() as stack:
        run(report, stack, options.database, quick=options.quick, insecure=options.insecure)
    report.finish()


if __name__ == "__main__":
    main()
