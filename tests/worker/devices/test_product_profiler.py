"""Tests of the matrix products that a worker measures by quant type."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import numpy as np
import pytest
from numpy.typing import NDArray

from llamaclust.core.profile import DeviceProfile
from llamaclust.kernels import _native
from llamaclust.kernels.cpu.quantize import QUANTIZED_TYPES
from llamaclust.model.quant_types import QuantType
from llamaclust.worker.devices import product_profiler
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.devices.product_profiler import ROWS, measure_products
from llamaclust.worker.settings import WorkerSettings

GIB = 1 << 30


def test_types_that_are_asked_for_are_measured_with_few_rows_and_many() -> None:
    found = measure_products((QuantType.Q4_K, QuantType.IQ1_S, QuantType.Q4_K), 1, "", 4 * GIB)
    DeviceProfile(1.0, 1.0, products=found).check()
    by_type = {kind: list(times) for kind, times in groupby(found, lambda time: time.quant_type)}
    assert list(by_type) == [QuantType.Q4_K, QuantType.IQ1_S]
    for times in by_type.values():
        assert tuple(time.rows for time in times) == ROWS
        assert 0 < times[0].byte_s < times[-1].byte_s, "128 rows take many times as long"


def test_types_that_are_not_computed_with_and_machines_without_memory_are_left_out() -> None:
    assert measure_products((QuantType.I32, 250), 1, "", 4 * GIB) == ()
    assert measure_products((QuantType.Q4_K,), 1, "", 100 << 20) == ()


def test_every_type_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_profiler, "_LEAST_BYTES", 1)
    monkeypatch.setattr(product_profiler, "_WEIGHT_ROWS", 64)
    found = measure_products(QUANTIZED_TYPES, 1, "generic", 4 * GIB)
    assert {time.quant_type for time in found} == {*map(int, QUANTIZED_TYPES)}


def test_a_large_cache_that_takes_long_to_flush_leaves_fewer_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, tries = 0.0, list[int]()

    class Slow:
        def __init__(self, n_bytes: int) -> None: ...

        def sweep(self) -> None:
            nonlocal now_s
            now_s += 0.2

    def product(level: str, matrices: object, x: NDArray[np.float32], threads: int, near: bool) -> float:
        tries.append(len(x))
        return 0.001

    monkeypatch.setattr(product_profiler, "CacheFlush", Slow)
    monkeypatch.setattr(product_profiler, "perf_counter", lambda: now_s)
    monkeypatch.setattr(_native, "matmul_seconds", product)
    assert len(measure_products((QuantType.Q8_0,), 1, "", 4 * GIB)) == len(ROWS)
    assert Counter(tries) == {1: 4, 4: 2, 8: 2, 32: 5, 128: 5}, "one row both ways, many without a flush"


def test_a_worker_measures_products_without_a_model() -> None:
    profile = Device.open(WorkerSettings(name="a", threads=1)).measure(None, (QuantType.Q8_0,))
    assert {time.quant_type for time in profile.cpu.products} == {QuantType.Q8_0} and profile.cpu.concurrent == ()
    reference = Device.open(WorkerSettings(name="a", device="reference", threads=1))
    assert reference.measure(None, (QuantType.Q8_0,)).cpu.products == ()
