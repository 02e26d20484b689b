"""How a global batch is cut to fit a device."""

from __future__ import annotations

import itertools

import pytest

from cbtm_worker.train.memory import (
    Placement,
    after_out_of_memory,
    fits_whole,
    largest_divisor,
    left_for_activations,
    sequence_bytes,
    sequences_that_fit,
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


class Card:
    """Memory in which a pass takes `fixed` bytes and `each` a sequence."""

    def __init__(self, memory: int, *, fixed: int = 1000, each: int = 100) -> None:
        self.memory, self.fixed, self.each = memory, fixed, each
        self.passes: list[int] = []

    def __call__(self, sequences: int) -> int | None:
        self.passes.append(sequences)
        peak = self.fixed + sequences * self.each
        return peak if peak <= self.memory else None


@pytest.mark.parametrize(("memory", "fits"), [(1099, 0), (1100, 1), (1199, 1), (1200, 1), (2000, 8), (10**6, 9190)])
def test_two_passes_tell_how_many_sequences_fit(memory: int, fits: int) -> None:
    card = Card(memory)
    assert sequences_that_fit(card, budget=memory) == fits
    assert card.passes in ([1], [1, 2])
    assert fits < 2 or card(fits) is not None


def test_a_sequence_of_a_large_model_is_counted_in_gigabytes() -> None:
    # 1.3 B parameters (24 layers of 2,048 units), 2,048 tokens, half precision: activations 3.4 GB, logits 1.2 GB.
    size = sequence_bytes(sequence_length=2048, vocab_size=50_272, hidden_size=2048, layers=24, half=True)
    assert 4e9 < size < 5e9


def test_a_model_fits_with_its_training_state_and_a_pass_in_what_is_not_lost_between_blocks() -> None:
    # 16 bytes a parameter and 80 of a pass, in 92 % of what is free.
    assert fits_whole(parameters=240, pass_bytes=80, free_bytes=4_261)
    assert not fits_whole(parameters=240, pass_bytes=80, free_bytes=4_260)
    assert not fits_whole(parameters=241, pass_bytes=80, free_bytes=4_261)


def test_activations_get_what_gathered_weights_leave_and_never_less_than_nothing() -> None:
    assert left_for_activations(free_bytes=1000, gathered_bytes=300) == 620
    assert left_for_activations(free_bytes=1000, gathered_bytes=2000) == 0
