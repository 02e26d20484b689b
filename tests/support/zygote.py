"""Real `cbtm-worker` and `cbtm-coord` processes that start in milliseconds.

Importing torch and transformers takes seconds. One process, the zygote, imports all of it once and computes nothing;
each program that a test wants is forked from it and then is a process like any other: its own pid, signals, files,
exit code, and faults armed by `CBTM_FAULTS`. Linux and macOS.

    python -m tests.support.zygote      reads a JSON request a line, writes a JSON answer a line; ends with its input

Whatever is still running when the zygote's input ends is killed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# How long a step of training takes at least, in a worker started with this in its environment, in seconds.
THROTTLE_VARIABLE = "CBTM_TEST_STEP_SECONDS"
# What a program's wall clock is off by, in seconds.
SKEW_VARIABLE = "CBTM_TEST_CLOCK_SKEW"
# What a worker's link takes when it sends, in bytes a second.
LINK_VARIABLE = "CBTM_TEST_LINK_SPEED"
# Files larger than so many bytes go in parts; in the coordinator.
PART_VARIABLE = "CBTM_TEST_PART_BYTES"
# When set, what people have time for is not waited for: full disks, failed workers, tries to send.
HASTE_VARIABLE = "CBTM_TEST_HASTE"
_POLL_SECONDS = 0.02
# Has a program write the stacks of all its threads into its log; it goes on.
STACKS_SIGNAL = signal.SIGUSR1
_STACKS_SECONDS = 3.0
_EVIDENCE_CHARACTERS = 12_000


class Child:
    """A process forked by the zygote."""

    def __init__(self, zygote: Zygote, pid: int, log: Path) -> None:
        self._zygote = zygote
        self.pid = pid
        self.log = log
        self._code: int | None = None

    @property
    def output(self) -> str:
        """What it wrote to stdout and stderr so far."""
        return self.log.read_text("utf-8", errors="replace")

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        if self._code is None:
            self._code = self._zygote.ask({"poll": self.pid})["code"]
        return self._code

    def wait(self, seconds: float = 60.0) -> int:
        """Its exit code. Raises AssertionError, with what it wrote and its stacks, when it runs after `seconds`."""
        deadline = time.monotonic() + seconds
        pause = threading.Event()
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"process {self.pid} ({self.log.name}) still runs after {seconds:.0f} s; the end of what it wrote, "
                    f"and its stacks:\n{self.evidence()}"
                )
            pause.wait(_POLL_SECONDS)
        return code

    def evidence(self) -> str:
        """The end of what it wrote, and, of one that runs, the stacks of its threads, which it adds to its output."""
        before = size = self.log.stat().st_size
        self.send(STACKS_SIGNAL)
        deadline = time.monotonic() + _STACKS_SECONDS
        pause = threading.Event()
        # One that is stopped (SIGSTOP) writes nothing, which tells as much.
        while self.poll() is None and time.monotonic() < deadline:
            pause.wait(5 * _POLL_SECONDS)
            size, last = self.log.stat().st_size, size
            if size == last > before:
                break
        return self.output[-_EVIDENCE_CHARACTERS:]

    def send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        self.send(signal.SIGKILL)
        self.wait()


class Zygote:
    """The client's side; thread-safe."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        # As `run_app` has it before anything imports gRPC.
        environment["GRPC_VERBOSITY"] = "NONE"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
        )
        self._lock = threading.Lock()

    def spawn(self, program: str, arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> Child:
        """Starts `program` ("cbtm-worker" or "cbtm-coord") with its output in `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        request = {"program": program, "arguments": list(arguments), "log": str(log), "env": dict(env or {})}
        return Child(self, int(self.ask(request)["pid"]), log)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        if not line:
            raise AssertionError("the zygote has ended; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


# The zygote's own side

_PRELOADED = """
    scipy.sparse.linalg sklearn.decomposition sklearn.feature_extraction.text uvicorn
    transformers.models.llama.modeling_llama transformers.models.auto.modeling_auto
    transformers.models.auto.tokenization_auto transformers.tokenization_utils_tokenizers
    cbtm_coordinator.cli cbtm_coordinator.create_run cbtm_coordinator.process cbtm_coordinator.setup
    cbtm_worker.check cbtm_worker.cli cbtm_worker.loop cbtm_worker.train.trainer
""".split()


def _preload() -> None:
    """All that the programs import while they run; nothing here starts a thread."""
    for name in _PRELOADED:
        importlib.import_module(name)


def _throttle(seconds: float) -> None:
    """Makes each step take `seconds` at least, so that a test can act in the middle of a task."""
    from cbtm_worker.train import Trainer

    step = Trainer.train_step

    def slow(self: Any) -> Any:
        time.sleep(seconds)
        return step(self)

    Trainer.train_step = slow  # type: ignore[method-assign]


def _skew(seconds: float) -> None:
    """Shifts the wall clock; the monotonic one, like a real machine's, knows nothing of it.

    gRPC adds timeouts to the time as Python has it and compares with the system's. Those two never differ on a real
    machine, so it keeps the system's for both.
    """
    # It comes with the first channel, else.
    importlib.import_module("grpc._channel")
    real, real_ns = time.time, time.time_ns
    unshifted = types.SimpleNamespace(**vars(time))
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "grpc" and getattr(module, "time", None) is time:
            module.time = unshifted  # type: ignore[attr-defined]
    time.time = lambda: real() + seconds
    time.time_ns = lambda: real_ns() + int(seconds * 1e9)


def _narrow(bytes_per_second: float) -> None:
    """Makes sending slow, a little at a time, as a slow link does once the buffers on the way are full."""
    from cbtm_common import transfer

    send = transfer._slice
    transfer._CHUNK = max(1, int(bytes_per_second / 10))

    def slow(*arguments: Any) -> Any:
        for chunk in send(*arguments):
            time.sleep(len(chunk) / bytes_per_second)
            yield chunk

    transfer._slice = slow


def _cut(part_bytes: int) -> None:
    """Makes small checkpoints go in parts, as large ones do."""
    import functools

    from cbtm_coordinator import server

    server.ServiceContext = functools.partial(server.ServiceContext, part_size=part_bytes)  # type: ignore[assignment,misc]


def _hurry() -> None:
    from datetime import timedelta

    from cbtm_common.rpc import RetryPolicy
    from cbtm_coordinator import scheduler
    from cbtm_worker import loop, sender, uploader

    loop._FULL_DISK_WAIT = loop._OUTAGE_WAIT = 0.3
    uploader._FULL_DISK_SECONDS = 0.3
    sender._BACKOFF = RetryPolicy(attempts=1, initial=0.05, maximum=0.4)
    scheduler._BACKOFF = timedelta(seconds=0.5)


def _become(request: dict[str, Any]) -> None:
    """In the fork: turns into the program. Does not return."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    for name in [n for n in os.environ if n.startswith("CBTM_")]:
        del os.environ[name]
    os.environ.update(request["env"])
    random.seed()
    faulthandler.register(STACKS_SIGNAL, file=2, all_threads=True)
    from cbtm_common import faults

    faults._plan = faults.FaultPlan.parse(os.environ.get(faults.ENVIRONMENT_VARIABLE, ""))
    if THROTTLE_VARIABLE in os.environ:
        _throttle(float(os.environ[THROTTLE_VARIABLE]))
    if SKEW_VARIABLE in os.environ:
        _skew(float(os.environ[SKEW_VARIABLE]))
    if LINK_VARIABLE in os.environ:
        _narrow(float(os.environ[LINK_VARIABLE]))
    if PART_VARIABLE in os.environ:
        _cut(int(os.environ[PART_VARIABLE]))
    if HASTE_VARIABLE in os.environ:
        _hurry()
    program = request["program"]
    sys.argv = [program, *request["arguments"]]
    code = 0
    try:
        if program == "cbtm-worker":
            from cbtm_worker.cli import main
        else:
            from cbtm_coordinator.cli import main
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    running: set[int] = set()
    ended: dict[int, int] = {}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _preload()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid = request["poll"]
            if pid in running:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    running.discard(pid)
                    ended[pid] = os.waitstatus_to_exitcode(status)
            answers.write(json.dumps({"code": ended.get(pid)}) + "\n")
            continue
        child = os.fork()
        if child == 0:
            answers.close()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # Under nohup the tests ignore it, and so would every program that they start.
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            try:
                _become(request)
            finally:
                os._exit(70)
        running.add(child)
        answers.write(json.dumps({"pid": child}) + "\n")
    for pid in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    _serve()
