"""The order of training data, as a function of the step alone.

Sequences are numbered through the shards in order: sequence i of a shard is `tokens[i·L : i·L + L + 1]`, L inputs and
the L targets one further on, so that neighbours share one token and every token but a shard's first is a target once a
data epoch. A shard's last, partial sequence is left out. Data epoch e visits all sequences in the order of a
permutation keyed by (seed, data_key, e); batch n is positions n·B … n·B + B − 1 of the epochs laid end to end, so a
batch may span two epochs, and nothing is ever remembered between batches.

Not covered: reading tokens (`data`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

_ROUNDS = 6


class Permutation:
    """A keyed bijection of 0 … size − 1: no table, any element in constant time.

    A balanced Feistel network over the next even number of bits, walked along its cycle until it lands inside the
    range (Black & Rogaway, 2002, "Ciphers with Arbitrary Finite Domains"). Shuffles; is not meant to hide anything.
    """

    def __init__(self, size: int, key: bytes) -> None:
        if size < 1:
            raise ValueError(f"size: a permutation of {size} elements")
        self._size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = np.uint64((1 << self._half) - 1)
        digest = hashlib.blake2b(key, digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Images of `indices` [N], each in 0 … size − 1; [N]."""
        values = self._encrypt(indices.astype(np.uint64))
        # The domain is under four times the size, so a walk takes under four tries on average.
        outside = np.flatnonzero(values >= self._size)
        while outside.size:
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= self._size]
        return values.astype(np.int64)

    def _encrypt(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        half = np.uint64(self._half)
        left, right = values >> half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << half) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser: every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@lru_cache(maxsize=4)
def _epoch_order(size: int, seed: int, data_key: str, epoch: int) -> Permutation:
    return Permutation(size, f"order\0{seed}\0{data_key}\0{epoch}".encode())


def batch_indices(step: int, *, global_batch: int, sequences: int, seed: int, data_key: str) -> npt.NDArray[np.int64]:
    """Numbers of the sequences of batch `step` (from 0), each in 0 … sequences − 1; [global_batch]."""
    positions = np.arange(step * global_batch, (step + 1) * global_batch, dtype=np.int64)
    epochs, offsets = np.divmod(positions, sequences)
    indices = np.empty(global_batch, dtype=np.int64)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        chosen = epochs == epoch
        indices[chosen] = _epoch_order(sequences, seed, data_key, epoch)(offsets[chosen])
    return indices


def draw_seed(seed: int, data_key: str, step: int, micro_index: int) -> int:
    """Seed of the random numbers (dropout) of one micro-step; under 2^63."""
    digest = hashlib.blake2b(f"draw\0{seed}\0{data_key}\0{step}\0{micro_index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class SequenceTable:
    """Which shard and token offset each sequence number means."""

    def __init__(self, shard_tokens: Sequence[int], sequence_length: int) -> None:
        counts = [max(0, tokens - 1) // sequence_length for tokens in shard_tokens]
        self._length = sequence_length
        # starts[s] is the number of the first sequence of shard s; one more entry holds the total.
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(shard numbers [N], offsets of the first token within the shard [N])."""
        shards = np.searchsorted(self._starts, indices, side="right") - 1
        return shards, (indices - self._starts[shards]) * self._length
