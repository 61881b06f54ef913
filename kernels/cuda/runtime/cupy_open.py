"""Checks for CuPy, a driver and a GPU. The error says in one line what is missing and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llamaclust.core.errors import UsageError
from llamaclust.kernels.cuda.runtime.device import MIN_COMPUTE_CAPABILITY
from llamaclust.kernels.cuda.runtime.nvrtc import Nvrtc, open_nvrtc

_INSTALL = "pip install 'llamaclust[cuda13]', or 'llamaclust[cuda12]' for a driver older than 580"
_OLDEST_CUPY = 14
_NO_DEVICE, _OLD_DRIVER = 100, 35  # cudaErrorNoDevice, cudaErrorInsufficientDriver


@dataclass(frozen=True, slots=True)
class GpuProperties:
    name: str
    uuid: str  # Hexadecimal digits.
    memory_bytes: int
    compute_capability: tuple[int, int]
    sms: int
    shared_bytes: int


def import_cupy() -> Any:
    try:
        import cupy
    except ModuleNotFoundError as error:
        if error.name != "cupy":
            raise UsageError(f"device cuda: CuPy lacks the module {error.name}: {_INSTALL}") from error
        raise UsageError(f"device cuda needs CuPy: {_INSTALL}") from error
    except ImportError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" =")]
        raise UsageError(f"device cuda: CuPy does not start ({lines[-1] if lines else error}): {_INSTALL}") from error
    if int(cupy.__version__.split(".")[0]) < _OLDEST_CUPY:
        raise UsageError(
            f"device cuda needs CuPy {_OLDEST_CUPY} or later, but {cupy.__version__} is installed: {_INSTALL}"
        )
    return cupy


def gpu_properties(cupy: Any, index: int) -> GpuProperties:
    count = _count(cupy)
    gpus = [_properties(cupy, number) for number in range(count)]
    if index >= count:
        there = ", ".join(f"cuda:{number} ({gpu.name})" for number, gpu in enumerate(gpus))
        raise UsageError(f"device cuda:{index}: there is no such GPU; available: {there}")
    gpu, (major, minor) = gpus[index], MIN_COMPUTE_CAPABILITY
    if gpu.compute_capability < MIN_COMPUTE_CAPABILITY:
        found = _version(gpu.compute_capability)
        raise UsageError(
            f"device cuda:{index}: {gpu.name} has compute capability {found}, but kernels need {major}.{minor} (GTX 10)"
        )
    return gpu


def usable_nvrtc(cupy: Any, architecture: int) -> Nvrtc:
    """Raises UsageError if NVRTC is missing, or is too new for the driver or for `architecture` (61 means 6.1)."""
    nvrtc, driver = open_nvrtc(), cupy.cuda.runtime.driverGetVersion()
    if nvrtc.version[0] > driver // 1000:
        made_by = _version(nvrtc.version)
        raise UsageError(
            f"device cuda: the driver is for CUDA {_of_cuda(driver)}, but NVRTC is {made_by}: "
            f"update the driver, or {_INSTALL}"
        )
    oldest = nvrtc.architectures[0]
    if architecture < oldest:
        made_by, needed, found = (
            _version(one) for one in (nvrtc.version, divmod(oldest, 10), divmod(architecture, 10))
        )
        raise UsageError(
            f"device cuda: NVRTC {made_by} compiles for compute capability {needed} and later, but the GPU "
            f"has {found}: uninstall cupy-cuda13x, then pip install 'llamaclust[cuda12]'"
        )
    return nvrtc


def _count(cupy: Any) -> int:
    runtime = cupy.cuda.runtime
    try:
        count: int = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        if error.status != _NO_DEVICE:
            raise UsageError(f"device cuda: {_driver_problem(runtime, error)}") from error
        count = 0
    if count == 0:
        raise UsageError("device cuda: no NVIDIA GPU is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES")
    return count


def _driver_problem(runtime: Any, error: Any) -> str:
    driver, built_for = _of_cuda(runtime.driverGetVersion()), _of_cuda(runtime.runtimeGetVersion())
    if driver == "0.0":
        return "no NVIDIA driver is installed, or this container has no access to the driver"
    if error.status == _OLD_DRIVER:
        return f"the driver is for CUDA {driver}, but CuPy is for {built_for}: update the driver, or {_INSTALL}"
    return str(error)


def _version(numbers: tuple[int, int]) -> str:
    return ".".join(map(str, numbers))


def _of_cuda(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _properties(cupy: Any, index: int) -> GpuProperties:
    found = cupy.cuda.runtime.getDeviceProperties(index)
    return GpuProperties(
        name=found["name"].decode(),
        uuid=bytes(found["uuid"]).hex(),
        memory_bytes=found["totalGlobalMem"],
        compute_capability=(found["major"], found["minor"]),
        sms=found["multiProcessorCount"],
        shared_bytes=found["sharedMemPerBlockOptin"],
    )
