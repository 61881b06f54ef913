"""Opens the backends of the processor and of GPUs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, cast

from llamaclust.core.errors import UsageError
from llamaclust.core.gpus import CUDA, Gpu, gpu_names
from llamaclust.core.profile import DeviceProfile
from llamaclust.kernels.backend import Backend, ExchangingBackend
from llamaclust.kernels.packed.cache_folder import PackedCacheFolder
from llamaclust.worker.devices import nvidia


class GpuBackend(ExchangingBackend, Protocol):
    device: str  # "cuda:N".

    @property
    def free_bytes(self) -> int:
        """GPU memory that this worker may still take, within its memory cap."""

    def gpu(self) -> Gpu: ...

    def measure(self) -> DeviceProfile: ...

    def limits(self) -> DeviceProfile:
        """Returns upper bounds on the GPU's speed."""

    def cache_flush(self) -> AbstractContextManager[Callable[[], None]]:
        """Returns a context manager, which yields a function that empties the GPU's cache."""

    def close(self) -> None: ...


def open_processor(
    device: str,
    threads: int,
    feature_level: str,
    packed_cache: PackedCacheFolder | None = None,
    *,
    mlock: bool = False,
) -> Backend:
    """Opens a processor's backend. Raises UsageError if this machine lacks the device or feature level."""
    if device == "cpu" or gpu_names(device):
        from llamaclust.kernels.cpu.backend import CpuBackend

        return CpuBackend(threads, feature_level, packed_cache=packed_cache, mlock=mlock)
    if device == "reference" and not mlock:
        from llamaclust.kernels.reference.backend import ReferenceBackend

        return ReferenceBackend()
    raise UsageError(f"device {device!r} is not supported; use cpu, cuda:N or reference")


def open_gpu(
    name: str,
    threads: int,
    memory_cap_bytes: int | None,
    packed_cache: PackedCacheFolder | None = None,
    kernels_dir: Path | None = None,
    *,
    graphs: bool = True,
) -> GpuBackend:
    """Opens the GPU "cuda:N". `threads` CPU threads pack weights. Raises a UsageError that states what is missing."""
    from llamaclust.kernels.cuda.backend import CudaBackend
    from llamaclust.kernels.cuda.runtime.cupy_device import CupyDevice
    from llamaclust.kernels.cuda.runtime.device import Device

    try:
        device = CupyDevice(int(name.removeprefix(CUDA)), memory_cap_bytes, kernels_dir)
    except UsageError as error:
        known = nvidia.advice()
        raise UsageError(f"{error}; {known}" if known else str(error)) from error
    # The cast is safe: CudaBackend passes a CupyDevice only buffers that the same CupyDevice allocated.
    return CudaBackend(name, cast(Device, device), threads, packed_cache, graphs=graphs)
