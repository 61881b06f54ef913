"""Measures this machine's limits: read bandwidth, and the peak of multiply-adds on a number of threads."""

from __future__ import annotations

from llamaclust.core.profile import DeviceProfile
from llamaclust.kernels import _native


class ReadProbe:
    """Measures the read bandwidth of a number of threads. Raises ValueError if the number is not in [1, 1024]."""

    def __init__(self, threads: int) -> None:
        self._probe = _native.ReadProbe(threads, 16)

    def measure(self, seconds: float = 0.3) -> float:
        """Returns the median of several reads in the fastest pattern, in GB/s. `seconds` must be from 0 to 60."""
        return self._probe.measure(seconds) / 1e9


def int8_peak(threads: int, seconds: float = 0.2) -> float:
    """Returns the rate of 8-bit multiply-adds, in 10^9 per second. Threads use the widest dot-product instruction."""
    return _native.int8_peak(threads, seconds) / 1e9


def fma_peak(threads: int, seconds: float = 0.2) -> float:
    return _native.fma_peak(threads, seconds) / 1e9


def measure_machine(threads: int) -> DeviceProfile:
    return DeviceProfile(_native.ReadProbe(threads, 3).measure(0.15), _native.int8_peak(threads, 0.05))
