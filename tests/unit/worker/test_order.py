"""Which sequences a batch holds, from the step alone."""

from __future__ import annotations

import numpy as np
import pytest

from cbtm_worker.train.order import Permutation, SequenceTable, batch_indices, draw_seed


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_permutation_visits_every_element_once(size: int) -> None:
    images = Permutation(size, b"key")(np.arange(size))
    assert sorted(images.tolist()) == list(range(size))


def test_permutation_of_a_range_too_large_for_a_table_stays_inside_it() -> None:
    size = 10**12 + 7
    indices = np.arange(size - 1000, size)
    images = Permutation(size, b"key")(indices)
    assert len(set(images.tolist())) == 1000
    assert images.min() >= 0
    assert images.max() < size


def test_permutation_shuffles() -> None:
    size = 10_000
    images = Permutation(size, b"key")(np.arange(size))
    # Of a random permutation: about one fixed point, neighbours a third of the range apart, no correlation.
    assert (images == np.arange(size)).sum() < 10
    assert abs(np.abs(np.diff(images)).mean() / size - 1 / 3) < 0.02
    assert abs(np.corrcoef(images, np.arange(size))[0, 1]) < 0.05


def test_another_key_gives_another_order() -> None:
    size = 1000
    orders = [Permutation(size, key)(np.arange(size)) for key in (b"a", b"b")]
    assert (orders[0] == orders[1]).sum() < 10


def test_permutation_is_the_same_in_every_version_and_on_every_machine() -> None:
    # A change here would break the resumption of tasks begun with an earlier version.
    assert Permutation(10, b"key")(np.arange(10)).tolist() == [2, 5, 4, 8, 1, 7, 6, 9, 0, 3]
    assert batch_indices(7, global_batch=4, sequences=10, seed=3, data_key="run-c0001").tolist() == [4, 9, 2, 8]
    assert draw_seed(3, "run-c0001", 7, 1) == 2473797390185080461


def test_batches_laid_end_to_end_visit_every_sequence_once_an_epoch() -> None:
    sequences, batch = 37, 8
    stream = np.concatenate(
        [batch_indices(n, global_batch=batch, sequences=sequences, seed=1, data_key="c") for n in range(37)]
    )
    epochs = stream.reshape(batch, sequences)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(sequences))
    assert (epochs[0] != epochs[1]).any()


def test_a_batch_larger_than_the_data_spans_several_epochs() -> None:
    batch = batch_indices(1, global_batch=10, sequences=3, seed=1, data_key="c")
    # Positions 10 to 19 are the end of epoch 3, epochs 4 and 5, and the start of epoch 6.
    assert sorted(batch[2:5].tolist()) == [0, 1, 2]
    assert sorted(batch[5:8].tolist()) == [0, 1, 2]


def test_two_clusters_and_two_seeds_see_other_orders() -> None:
    def order(seed: int, key: str) -> list[int]:
        return [int(i) for i in batch_indices(0, global_batch=64, sequences=64, seed=seed, data_key=key)]

    assert order(1, "a") != order(1, "b")
    assert order(1, "a") != order(2, "a")


def test_dropout_draws_differ_between_steps_and_micro_steps() -> None:
    draws = {draw_seed(0, "c", step, micro) for step in range(50) for micro in range(50)}
    assert len(draws) == 2500
    assert all(0 <= draw < 2**63 for draw in draws)


def test_sequences_share_one_token_and_leave_out_a_partial_end() -> None:
    # Length 4: shards of 13, 4, 9 and 1 tokens hold 3, 0, 2 and 0 sequences of 4 + 1 tokens.
    table = SequenceTable([13, 4, 9, 1], 4)
    assert len(table) == 5
    shards, offsets = table.locate(np.arange(5))
    assert shards.tolist() == [0, 0, 0, 2, 2]
    assert offsets.tolist() == [0, 4, 8, 0, 4]
