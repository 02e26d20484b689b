"""How a global batch is cut to fit a device."""

from __future__ import annotations

import itertools

import pytest

from cbtm_worker.train.memory import (
    Placement,
    after_out_of_memory,
    first_micro_batch,
    largest_divisor,
    sequence_bytes,
)


@pytest.mark.parametrize(
    ("number", "limit", "expected"), [(32, 32, 32), (32, 31, 16), (12, 5, 4), (7, 6, 1), (6, 100, 6), (6, 0, 1)]
)
def test_a_micro_batch_divides_the_global_batch(number: int, limit: int, expected: int) -> None:
    assert largest_divisor(number, limit) == expected


@pytest.mark.parametrize("global_batch", [1, 6, 32, 7, 96])
def test_running_out_of_memory_again_and_again_halves_then_recomputes_then_gives_up(global_batch: int) -> None:
    tried: list[Placement] = []
    placement: Placement | None = Placement(micro_batch=global_batch)
    while placement is not None:
        tried.append(placement)
        assert global_batch % placement.micro_batch == 0
        placement, reason = after_out_of_memory(placement, global_batch=global_batch, can_checkpoint=True)
        assert "does not fit" in reason
    assert len(set(tried)) == len(tried)
    assert tried[-1] == Placement(micro_batch=1, gradient_checkpointing=True)
    assert all(2 * b.micro_batch <= a.micro_batch or b.gradient_checkpointing for a, b in itertools.pairwise(tried))


def test_a_model_that_cannot_recompute_gives_up_at_one() -> None:
    assert after_out_of_memory(Placement(micro_batch=1), global_batch=8, can_checkpoint=False)[0] is None


def test_the_first_micro_batch_fills_the_memory_it_is_given() -> None:
    assert first_micro_batch(32, free_bytes=10_000, bytes_per_sequence=1000) == 8
    assert first_micro_batch(32, free_bytes=-5, bytes_per_sequence=1000) == 1
    assert first_micro_batch(32, free_bytes=10**9, bytes_per_sequence=1000) == 32


def test_a_sequence_of_a_large_model_is_counted_in_gigabytes() -> None:
    # 1.3 B parameters (24 layers of 2,048 units), 2,048 tokens, half precision: activations 3.4 GB, logits 1.2 GB.
    size = sequence_bytes(sequence_length=2048, vocab_size=50_272, hidden_size=2048, layers=24, half=True)
    assert 4e9 < size < 5e9
