"""Statistics of a tensor from blocks of its bytes: are all values finite, how large are they, how many are subnormal.

By bit patterns where that is faster or safer than arithmetic. BF16 and F16 are widened to F32, which is exact. Squares
are summed in float32 over 65,536 values at a time, and those sums in float64. Values under 2^-60 count as 0 in sums: a
processor takes a hundred times as long over subnormal products, and a file full of them would stall the check.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

from cbtm_common.places import places

# Values of these can be looked at; integers and booleans are what they are.
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})

# Fits the caches of a core.
_BLOCK = 1 << 16
_MAGNITUDE = np.uint32(0x7FFF_FFFF)
_INFINITY = np.uint32(0x7F80_0000)
_SUBNORMALS = np.uint32(0x007F_FFFF)
_NEGATIVE_ZERO = np.uint32(0x8000_0000)
# The bits of 2^-60.
_SMALL = np.uint32((127 - 60) << 23)

Bits = npt.NDArray[np.uint32]


class Statistics:
    """Of one tensor of `count` values of dtype `dtype`, which must be of FLOATS. `add` takes its bytes in order.

    `sampled` are its values at `cbtm_common.places`.
    """

    def __init__(self, dtype: str, count: int) -> None:
        self._dtype = dtype
        self._places = deque(places(count))
        self._seen = 0
        self.sampled: list[float] = []
        self._scratch: Bits = np.empty(_BLOCK, np.uint32)
        self.count = 0
        self.sum = 0.0
        self.sum_squares = 0.0
        self.subnormals = 0
        self.is_finite = True
        self.has_negative = False

    @property
    def rms(self) -> float:
        """Root mean square; 0 of no values."""
        return math.sqrt(self.sum_squares / self.count) if self.count else 0.0

    @property
    def subnormal_share(self) -> float:
        return self.subnormals / self.count if self.count else 0.0

    def add(self, data: memoryview) -> None:
        """Whole values, any number of them."""
        values = _values(self._dtype, data)
        while self._places and self._places[0] < self._seen + len(values):
            self.sampled.append(float(values[self._places.popleft() - self._seen]))
        self._seen += len(values)
        for start in range(0, len(values), _BLOCK):
            block = values[start : start + _BLOCK]
            if values.itemsize == 8:
                self._add_wide(block.view(np.float64))
            else:
                self._add(block.view(np.uint32))

    def _add(self, bits: Bits) -> None:
        magnitude = np.bitwise_and(bits, _MAGNITUDE, out=self._scratch[: len(bits)])
        self.count += len(bits)
        if magnitude.max(initial=0) >= _INFINITY:
            self.is_finite = False
            return
        if bits.max(initial=0) > _NEGATIVE_ZERO:
            self.has_negative = True
        values = bits.view(np.float32)
        small = magnitude < _SMALL
        if small.any():
            # 0 becomes the largest number, and so counts as none.
            self.subnormals += int(np.count_nonzero(np.subtract(magnitude, np.uint32(1)) < _SUBNORMALS))
            values = np.where(small, np.float32(0), values)
        with np.errstate(over="ignore"):
            self.sum += float(values.sum(dtype=np.float64))
            squares = float(np.dot(values, values))
        # Beyond float32's range a sum of squares is still a number in float64.
        self.sum_squares += squares if math.isfinite(squares) else float(np.square(values, dtype=np.float64).sum())

    def _add_wide(self, values: npt.NDArray[np.float64]) -> None:
        self.count += len(values)
        if not np.isfinite(values).all():
            self.is_finite = False
            return
        self.has_negative |= bool((values < 0).any())
        magnitude = np.abs(values)
        self.subnormals += int(np.count_nonzero((magnitude > 0) & (magnitude < np.finfo(np.float64).tiny)))
        with np.errstate(over="ignore", under="ignore"):
            self.sum += float(values.sum())
            self.sum_squares += float(np.dot(values, values))


def _values(dtype: str, data: memoryview) -> npt.NDArray[Any]:
    match dtype:
        case "F32":
            return np.frombuffer(data, "<f4")
        case "BF16":
            return (np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
        case "F16":
            return np.frombuffer(data, "<f2").astype(np.float32)
        case _:
            return np.frombuffer(data, "<f8")
