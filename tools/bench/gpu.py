"""Limits of a GPU, measured before and after each run of a benchmark."""

from __future__ import annotations

from statistics import median

from llamaclust.core.profile import DeviceProfile
from llamaclust.tools.bench.limits import MachineLimits
from llamaclust.worker.devices.backends import GpuBackend


class GpuLimits:
    """Of its memory's bandwidth, and of 8-bit products; float weights are held against the latter, too. Blocks."""

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
        """GB/s."""
        self._found.append(self._gpu.limits())
        return self._found[-1].read_bytes_s / 1e9

    async def peak(self) -> float:
        """10^9 multiply-adds a second."""
        self._found.append(self._gpu.limits())
        return self._found[-1].int8_macs_s / 1e9
