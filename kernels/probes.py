"""Measures this machine's limits for kernels on some threads: read bandwidth and multiply-add peaks."""

from __future__ import annotations

from llamaclust.core.profile import DeviceProfile
from llamaclust.kernels import _native


class ReadProbe:
    """Measures the read bandwidth of `threads` (1..1024, or ValueError) over 16 times the last cache, or a GiB."""

    def __init__(self, threads: int) -> None:
        self._probe = _native.ReadProbe(threads, 16)

    def measure(self, seconds: float = 0.3) -> float:
        """Returns GB/s: the median of several reads in the pattern that was the fastest just before. (The maximum of
        many reads would exceed what a run as long as all of them reaches.) Raises ValueError outside 0..60 seconds."""
        return self._probe.measure(seconds) / 1e9


def int8_peak(threads: int, seconds: float = 0.2) -> float:
    """Returns 10^9 8-bit multiply-adds a second of `threads` together, by the widest dot product of the CPU."""
    return _native.int8_peak(threads, seconds) / 1e9


def fma_peak(threads: int, seconds: float = 0.2) -> float:
    """Returns 10^9 float32 multiply-adds a second of `threads` together."""
    return _native.fma_peak(threads, seconds) / 1e9


def measure_machine(threads: int) -> DeviceProfile:
    """Measures both limits in less than half a second, over a smaller buffer: for a worker's registration."""
    return DeviceProfile(_native.ReadProbe(threads, 3).measure(0.15), _native.int8_peak(threads, 0.05))
