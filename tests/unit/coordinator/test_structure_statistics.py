"""Statistics by bits and blocks agree with arithmetic, whatever the dtype, the values and the cut of the stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save

from cbtm_common.errors import IntegrityError
from cbtm_common.places import places
from cbtm_common.safetensors_header import SafetensorsHeader
from cbtm_coordinator.structure.statistics import Statistics
from cbtm_coordinator.structure.stream import SafetensorsStream


def of(values: npt.NDArray[Any], dtype: str = "F32") -> Statistics:
    statistics = Statistics(dtype, len(values))
    statistics.add(memoryview(values.tobytes()))
    return statistics


@pytest.mark.parametrize("count", [1, 5, 16, 100, 200_001])
def test_sixteen_values_are_kept_as_they_are_however_the_bytes_come(count: int) -> None:
    values = np.arange(count, dtype=np.float32)
    statistics = Statistics("F32", count)
    for start in range(0, count, 70_000):
        statistics.add(memoryview(values[start : start + 70_000].tobytes()))
    assert statistics.sampled == [float(values[place]) for place in places(count)]
    assert statistics.sampled[0] == 0
    assert len(statistics.sampled) == min(count, 16)


@pytest.mark.parametrize(("dtype", "kind"), [("F32", np.float32), ("F16", np.float16), ("F64", np.float64)])
def test_sums_agree_with_numpy_over_many_blocks(dtype: str, kind: type) -> None:
    values = np.random.default_rng(0).standard_normal(200_001).astype(kind)
    found = of(values, dtype)
    exact = values.astype(np.float64)
    assert found.count == len(values)
    assert found.rms == pytest.approx(float(np.sqrt((exact**2).mean())), rel=1e-5)
    assert found.sum == pytest.approx(float(exact.sum()), rel=1e-4)
    assert found.is_finite
    assert found.has_negative
    assert found.subnormals == 0


def test_bfloat16_is_read_as_its_float32() -> None:
    values = np.array([1.5, -2.0, 0.0], np.float32)
    found = of((values.view(np.uint32) >> 16).astype(np.uint16), "BF16")
    assert (found.sum, found.sum_squares, found.has_negative) == (-0.5, 6.25, True)


@pytest.mark.parametrize("dtype", ["F32", "F64", "F16", "BF16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_in_the_last_block_that_is_no_number_is_found(dtype: str, value: float) -> None:
    values = np.zeros(70_000, np.float32)
    values[-1] = value
    kind = {"F32": np.float32, "F64": np.float64, "F16": np.float16}.get(dtype)
    stored = (values.view(np.uint32) >> 16).astype(np.uint16) if kind is None else values.astype(kind)
    assert not of(stored, dtype).is_finite


def test_a_signalling_nan_is_no_number() -> None:
    assert not of(np.array([0x7F800001], np.uint32)).is_finite


def test_subnormals_are_counted_and_zeros_are_not() -> None:
    found = of(np.array([0.0, -0.0, 1e-45, -1e-40, 1.1754942e-38, 1.1754944e-38, 1.0], np.float32))
    assert found.subnormals == 3
    assert found.sum_squares == 1
    assert of(np.array([5e-324, 0, 1], np.float64), "F64").subnormals == 1


def test_negative_zero_is_not_negative() -> None:
    assert not of(np.array([-0.0, 1], np.float32)).has_negative
    assert of(np.array([-1e-45], np.float32)).has_negative


def test_squares_beyond_float32_are_still_numbers() -> None:
    assert of(np.full(10, 3e38, np.float32)).rms == pytest.approx(3e38)


def test_nothing_has_no_size() -> None:
    assert of(np.zeros(0, np.float32)).rms == 0


@pytest.mark.parametrize("chunk", [1, 3, 7, 64, 1 << 20])
def test_a_stream_tells_the_same_however_it_is_cut(chunk: int) -> None:
    tensors = {
        "a": np.arange(31, dtype=np.float32),
        "b": np.arange(5, dtype=np.int8),
        "c": np.arange(7, dtype=np.float64),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(-2.0, np.float32),
        "z": np.zeros(0, np.float16),
    }
    data = save(tensors)
    headers: list[SafetensorsHeader] = []
    found: dict[str, Statistics] = {}
    stream = SafetensorsStream("file", len(data), headers.append, found.__setitem__)
    for start in range(0, len(data), chunk):
        stream.feed(data[start : start + chunk])
    stream.finish()
    assert set(headers[0].tensors) == set(tensors)
    assert {name: (s.count, s.sum) for name, s in found.items()} == {
        name: (tensor.size, float(tensor.sum())) for name, tensor in tensors.items() if tensor.dtype != np.int8
    }


@pytest.mark.parametrize("missing", [1, 8, 200])
def test_a_stream_that_ends_early_is_refused(missing: int) -> None:
    data = save({"a": np.ones(100, np.float32)})
    stream = SafetensorsStream("file", len(data), lambda header: None, lambda name, statistics: None)
    stream.feed(data[:-missing])
    with pytest.raises(IntegrityError, match="middle"):
        stream.finish()
