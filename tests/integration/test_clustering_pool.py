"""Pieces over several processes: their order, errors, and that no worker outlives who started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cbtm_common.errors import ResourceExhausted
from cbtm_coordinator.clustering.engine import Local
from cbtm_coordinator.clustering.fit import fit
from cbtm_coordinator.clustering.pool import in_order

pytestmark = pytest.mark.integration


def squared(piece: int) -> int:
    if piece == 100:
        raise ValueError("no hundreds")
    if piece == 200:
        os.kill(os.getpid(), signal.SIGKILL)
    return piece * piece


def test_answers_come_in_order_and_pieces_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []

    def pieces() -> Iterator[int]:
        for piece in range(50):
            taken.append(piece)
            yield piece

    for done, answer in enumerate(in_order(squared, pieces(), processes=2)):
        assert answer == done * done
        assert len(taken) <= done + 4
    assert len(taken) == 50


def test_what_a_worker_raises_is_raised_here() -> None:
    with pytest.raises(ValueError, match="no hundreds"):
        list(in_order(squared, [1, 100, 2], processes=2))


def test_a_worker_that_is_killed_is_reported() -> None:
    with pytest.raises(ResourceExhausted, match="memory"):
        list(in_order(squared, [1, 200, 2], processes=2))


def test_a_fit_is_the_same_on_several_processes() -> None:
    texts = [f"ship sea{i % 9} mast{i % 5} {'wreck sail' if i % 2 else 'loop pointer'}" for i in range(1200)]
    one, two = (fit(texts, ["a", "b", "c"], seed=0, temperature=0.1, engine=Local(n)).router for n in (1, 2))
    assert one.embedding.terms == two.embedding.terms
    np.testing.assert_array_equal(one.embedding.projection, two.embedding.projection)
    np.testing.assert_array_equal(one.centroids, two.centroids)


PROGRAM = """
import os, sys, time
from cbtm_coordinator.clustering.pool import in_order

def slow(piece):
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    list(in_order(slow, range(4), processes=2))
"""


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        parent.kill()
        # Their end of the pipe closes when the last of them has ended.
        parent.stdout.read()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
