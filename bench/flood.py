"""One worker floods the coordinator: how long the others' renewals take, with its limits and without.

    python -m bench.flood [--quick]

So many workers renew at their usual pace while one, with a valid credential, sends renewals over many connections as
fast as it can. The rival is the same coordinator with all limits off. SQLite, loopback; flood, workers and coordinator
share this machine's cores, so the flood takes time from those that it is measured against.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import grpc
import numpy as np

from bench.pacing import p99, paced
from bench.processes import running_coordinator
from bench.report import Report
from bench.simulated_workers import Load, Simulated, Target, fill, make_workers, open_channel, target_of
from cbtm_api.v1 import worker_service_pb2 as ws
from cbtm_common.rpc import CHANNEL_OPTIONS
from cbtm_coordinator.store import Store

WORKERS = 300
# Renewals a second, of all of them.
RATE = 50.0
CONNECTIONS, IN_FLIGHT = 8, 100
OFF = {
    f"CBTM_{name}": "0"
    for name in (
        "CALLS_PER_SECOND",
        "ANONYMOUS_CALLS_PER_SECOND",
        "REFUSALS_PER_SECOND",
        "REGISTRATIONS_PER_SECOND",
        "LEASES_PER_WORKER",
    )
}


def flood(target: Target, worker: Simulated, sent: multiprocessing.sharedctypes.Synchronized[int]) -> None:
    """In a process of its own, until it is ended."""

    async def one(renew: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes], request: bytes) -> None:
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await renew(request, metadata=(("authorization", f"Bearer {worker.secret}"),), timeout=30)
            sent.value += 1

    async def run() -> None:
        request = ws.RenewLeaseRequest(lease_id=worker.lease_id, epoch=worker.epoch).SerializeToString()
        calls = []
        for _ in range(CONNECTIONS):
            channel = open_channel(target, [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)])
            renew = channel.unary_unary(
                "/cbtm_api.v1.WorkerService/RenewLease", request_serializer=None, response_deserializer=None
            )
            calls += [one(renew, request) for _ in range(IN_FLIGHT)]
        await asyncio.gather(*calls)

    asyncio.run(run())


async def measure(
    report: Report, name: str, store: Store, target: Target, *, seconds: float, bar: float | None
) -> None:
    load = Load(target)
    held = [await load.acquire(worker) for worker in make_workers(store, WORKERS + 1, target.data_dir)]
    attacker = held.pop()
    context = multiprocessing.get_context("spawn")
    sent = context.Value("q", 0)
    late = 0

    async def renew(number: int) -> None:
        nonlocal late
        try:
            await load.renew(held[number % WORKERS], number)
        except grpc.aio.AioRpcError as error:
            # Who ends a call at its deadline first, caller or coordinator, is chance.
            if error.code() not in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
                raise
            late += 1

    quiet = await paced(renew, rate=RATE, seconds=seconds)
    process = context.Process(target=flood, args=(target, attacker, sent), daemon=True)
    process.start()
    try:
        while not sent.value:
            await asyncio.sleep(0.05)
        # The burst that it is granted is over by then.
        await asyncio.sleep(2)
        before = sent.value
        began = time.perf_counter()
        flooded = await paced(renew, rate=RATE, seconds=seconds)
        speed = (sent.value - before) / (time.perf_counter() - began)
    finally:
        process.kill()
        process.join()
    report.add(f"{name}: p99 of the others' renewals in quiet", p99(quiet), "ms")
    report.add(f"{name}: p99 of the others' renewals under the flood", p99(flooded), "ms", bar=bar, sense="at most")
    report.add(f"{name}: p50 of the others' renewals under the flood", 1000 * float(np.median(flooded)), "ms")
    report.add(f"{name}: of the others' renewals not answered in 30 s", late, "")
    report.add(f"{name}: calls that the flood had answered", speed, "/s")
    await load.close()


def run(
    report: Report, stack: ExitStack, name: str, environment: dict[str, str], *, bar: float | None, quick: bool
) -> None:
    scratch = Path(stack.enter_context(TemporaryDirectory()))
    coordinator = stack.enter_context(running_coordinator(scratch / "coordinator", environment))
    store = Store(f"sqlite:///{scratch / 'coordinator' / 'registry.db'}")
    stack.callback(store.close)
    target = target_of(coordinator)
    fill(store, open_tasks=WORKERS + 1, name="flood")
    asyncio.run(measure(report, name, store, target, seconds=5.0 if quick else 30.0, bar=bar))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5 s instead of 30 for each figure")
    options = parser.parse_args()
    report = Report(bench="flood")
    for name, environment, bar in (("limits", {}, 250.0), ("no limits", OFF, None)):
        with ExitStack() as stack:
            run(report, stack, name, environment, bar=bar, quick=options.quick)
    report.finish()


if __name__ == "__main__":
    main()
