"""Tests of rates that are measured on a simulated GPU, whose work takes a known time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from llamaclust.kernels.cuda import probe
from llamaclust.kernels.cuda.runtime.device import Launch

COLS = 4096
TILE_BYTES = 16 * COLS // 32 * 18
"""Bytes of 16 rows of Q4_0."""


@dataclass(eq=False)
class TimedBuffer:
    n_bytes: int
    address: int = 1 << 20

    def at(self, offset_bytes: int = 0) -> np.uint64:
        return np.uint64(self.address + offset_bytes)

    def close(self) -> None:
        pass


@dataclass
class TimedDevice:
    """A simulated GPU with these rates, which loads a kernel at its first launch."""

    read_bytes_s: float
    macs_s: float
    load_s: float
    sms: int = 132
    shared_bytes: int = 227 << 10
    compute_capability: tuple[int, int] = (9, 0)
    free_bytes: int = 64 << 30
    clock_s: float = 0.0
    loaded: set[str] = field(default_factory=set)

    def allocate(self, n_bytes: int) -> TimedBuffer:
        return TimedBuffer(n_bytes)

    def upload(self, buffer: TimedBuffer, offset_bytes: int, data: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def launch(self, launch: Launch) -> None:
        if launch.kernel not in self.loaded:
            self.clock_s += self.load_s
            self.loaded.add(launch.kernel)
        self.clock_s += self._work_s(launch)

    def _work_s(self, launch: Launch) -> float:
        name = launch.kernel.rpartition(".")[2].partition("_")[0]
        if name == "read":
            return int(launch.args[1]) * 65536 / self.read_bytes_s
        if name == "multiply":
            return int(launch.args[0]) * 8 * self.sms * 8 * (8 * 16 * 32 * 8) / self.macs_s
        outputs = int(launch.args[1])
        return outputs / 16 * TILE_BYTES / self.read_bytes_s if name == "gemv" else 128 * outputs * COLS / self.macs_s


@pytest.mark.parametrize("load_s", [0.0, 0.0003, 0.003, 0.1])
@pytest.mark.parametrize(("read_bytes_s", "macs_s"), [(50e9, 1e12), (900e9, 90e12), (3095e9, 900e12), (7e12, 2e15)])
def test_the_load_of_a_kernel_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, read_bytes_s: float, macs_s: float, load_s: float
) -> None:
    device: Any = TimedDevice(read_bytes_s, macs_s, load_s)
    monkeypatch.setattr(probe, "perf_counter", lambda: device.clock_s)
    for measured in (probe.measure(device), probe.limits(device)):
        assert measured == pytest.approx((read_bytes_s, macs_s), rel=0.01)
    assert {"gemv", "gemm", "read", "multiply"} == {one.rpartition(".")[2].partition("_")[0] for one in device.loaded}


@pytest.mark.parametrize("read_bytes_s", [50e9, 3095e9, 7e12])
def test_a_measurement_takes_less_than_half_a_second(monkeypatch: pytest.MonkeyPatch, read_bytes_s: float) -> None:
    device: Any = TimedDevice(read_bytes_s, 300 * read_bytes_s, 0.01)
    monkeypatch.setattr(probe, "perf_counter", lambda: device.clock_s)
    probe.measure(device)
    assert 0.01 < device.clock_s < 0.5
