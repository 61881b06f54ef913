"""What this machine can do at best on some threads: read bandwidth and multiply-add peaks, the limits of kernels."""

from __future__ import annotations

from llamaclust.core.profile import DeviceProfile
from llamaclust.kernels import _native


class ReadProbe:
    """How fast `threads` together read memory, measured as often as wanted over one buffer of 16 times the last cache,
    or a GiB.

    ValueError outside 1..1024 threads.
    """

    def __init__(self, threads: int) -> None:
        self._probe = _native.ReadProbe(threads, 16)

    def measure(self, seconds: float = 0.3) -> float:
        """GB/s: the median of several reads in the plain pattern that was the best of some just before. (The maximum of
        many reads would be above what a run as long as all of them can reach.) ValueError outside 0..60 seconds."""
        return self._probe.measure(seconds) / 1e9


def int8_peak(threads: int, seconds: float = 0.2) -> float:
    """10^9 8-bit multiply-adds a second of `threads` together, by the widest dot product the CPU has."""
    return _native.int8_peak(threads, seconds) / 1e9


def fma_peak(threads: int, seconds: float = 0.2) -> float:
    """10^9 float32 multiply-adds a second of `threads` together."""
    return _native.fma_peak(threads, seconds) / 1e9


def measure_machine(threads: int) -> DeviceProfile:
    """Both limits in less than half a second, over a smaller buffer: for a worker's registration."""
    return DeviceProfile(_native.ReadProbe(threads, 3).measure(0.15), _native.int8_peak(threads, 0.05))
