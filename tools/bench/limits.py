"""Measures this machine's limits directly before and after each run, since the machine's speed may change."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Self, TypeVar

from llamaclust.core.background import in_background
from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.core.profile import DeviceProfile
from llamaclust.kernels import probes
from llamaclust.wire.rpc.deadlines import deadline

if TYPE_CHECKING:
    from llamaclust.worker.devices.backends import GpuBackend

_Result = TypeVar("_Result")

_READ_S = 0.3
_PEAK_S = 0.1
_PROBE_S = 600.0


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        every = sorted(values)
        return cls(median(every), every[0], every[-1])

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.least:{spec}} .. {self.most:{spec}})"


@dataclass(frozen=True, slots=True)
class Pair:
    """The speed of one run, and the machine's limits directly before and after it, in the same unit."""

    speed: float
    before: float
    after: float

    @property
    def limit(self) -> float:
        # The greater value would exceed the real limit, because of noise.
        return (self.before + self.after) / 2

    @property
    def share(self) -> float:
        return self.speed / self.limit


@dataclass(frozen=True, slots=True)
class MachineLimits:
    """Medians over the run, in 10^9 per second: bytes read, 8-bit multiply-adds, float32 multiply-adds."""

    read_gb_s: float
    int8_gmac_s: float
    fma_gmac_s: float


class Limits:
    """Measures the processor's limits with `threads` threads. `float_share` is the share of multiply-adds with float
    weights."""

    def __init__(self, probe: probes.ReadProbe, threads: int, float_share: float) -> None:
        self._probe, self._threads, self._float_share = probe, threads, float_share
        self._read_gb_s, self._int8_gmac_s, self._fma_gmac_s = list[float](), list[float](), list[float]()

    @classmethod
    async def open(cls, threads: int, float_share: float) -> Self:
        try:
            return cls(await _elsewhere(partial(probes.ReadProbe, threads)), threads, float_share)
        except MemoryError as error:
            what = "measuring the read bandwidth takes a quarter of the free memory, up to 1024 MiB"
            raise InsufficientMemoryError(
                f"{what}, which the system refuses; end other programs or raise the memory limit"
            ) from error

    @property
    def machine(self) -> MachineLimits:
        return MachineLimits(median(self._read_gb_s), median(self._int8_gmac_s), median(self._fma_gmac_s))

    async def read(self) -> float:
        self._read_gb_s.append(await _elsewhere(partial(self._probe.measure, _READ_S)))
        return self._read_gb_s[-1]

    async def peak(self) -> float:
        """Returns the peak speed for the model's mix of 8-bit and float32 multiply-adds, in 10^9 per second."""
        self._int8_gmac_s.append(await _elsewhere(partial(probes.int8_peak, self._threads, _PEAK_S)))
        self._fma_gmac_s.append(await _elsewhere(partial(probes.fma_peak, self._threads, _PEAK_S)))
        return 1 / ((1 - self._float_share) / self._int8_gmac_s[-1] + self._float_share / self._fma_gmac_s[-1])


class GpuLimits:
    """Measures a GPU's memory bandwidth and its peak of 8-bit multiply-adds. The methods block the event loop."""

    def __init__(self, gpu: GpuBackend) -> None:
        self._gpu = gpu
        self._found: list[DeviceProfile] = []

    @property
    def machine(self) -> MachineLimits:
        read, macs = (
            median(getattr(profile, name) for profile in self._found) for name in ("read_bytes_s", "int8_macs_s")
        )
        return MachineLimits(read / 1e9, macs / 1e9, fma_gmac_s=0.0)

    async def read(self) -> float:
        self._found.append(self._gpu.limits())
        return self._found[-1].read_bytes_s / 1e9

    async def peak(self) -> float:
        self._found.append(self._gpu.limits())
        return self._found[-1].int8_macs_s / 1e9


async def paired(run: Callable[[], Awaitable[float]], work: float, limit: Callable[[], Awaitable[float]]) -> Pair:
    """Measures the limit, then a run, then the limit again. `run` does `work` units of work and returns the seconds
    that it took. `limit` returns the limit in 10^9 units per second."""
    before = await limit()
    seconds = await run()
    return Pair(work / seconds / 1e9, before, await limit())


async def _elsewhere(probe: Callable[[], _Result]) -> _Result:
    async with deadline("measuring the machine's limits", _PROBE_S):
        return await asyncio.wrap_future(in_background(probe))
