"""A GPU through CuPy: memory, copies, launches and graphs on a stream of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llamaclust.core.errors import InsufficientMemoryError, UsageError
from llamaclust.core.sizes import MIB, mib
from llamaclust.kernels.cuda.runtime.cubin_cache import CubinCache
from llamaclust.kernels.cuda.runtime.cupy_open import GpuProperties, gpu_properties, import_cupy, usable_nvrtc
from llamaclust.kernels.cuda.runtime.device import PLAIN_SHARED_BYTES, Buffer, Bytes, Launch
from llamaclust.kernels.cuda.runtime.sources import modules, whole_text

_log = logging.getLogger(__name__)

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


@dataclass(eq=False, slots=True)
class CupyBuffer:
    """See `kernels.cuda.runtime.device.Buffer`."""

    device: CupyDevice
    address: int
    n_bytes: int

    def at(self, offset_bytes: int = 0) -> np.uint64:
        assert self.address != 0, "a buffer that was closed"
        assert 0 <= offset_bytes <= self.n_bytes, f"{offset_bytes} of {self.n_bytes} bytes"
        return np.uint64(self.address + offset_bytes)

    def close(self) -> None:
        self.device.free(self)


@dataclass(eq=False, slots=True)
class CupyGraph:
    """See `kernels.cuda.runtime.device.Graph`."""

    device: CupyDevice
    graph: Any

    def launch(self) -> None:
        self.device.replay(self.graph)

    def close(self) -> None:
        self.graph = None


@dataclass(frozen=True, slots=True)
class CupyEvent:
    """See `kernels.cuda.runtime.device.Event`."""

    event: Any

    def wait(self) -> None:
        self.event.synchronize()


def _part(buffer: Buffer, offset_bytes: int, n_bytes: int) -> int:
    """The address of bytes that are all in it."""
    assert offset_bytes + n_bytes <= buffer.n_bytes, f"{offset_bytes} + {n_bytes} of {buffer.n_bytes} bytes"
    return int(buffer.at(offset_bytes))


class CupyDevice:
    """See `kernels.cuda.runtime.device.Device`."""

    def __init__(self, index: int = 0, memory_cap_bytes: int | None = None, folder: Path | None = None) -> None:
        """GPU number `index` of CUDA, limited to `memory_cap_bytes`; compiled kernels are kept in `folder`. UsageError
        that names what is missing: CuPy, NVRTC, a driver, the GPU, a newer GPU, or a GPU that is free."""
        self._cupy = import_cupy()
        self._index, self._cap_bytes = index, memory_cap_bytes
        self._runtime = self._cupy.cuda.runtime
        self.failures: tuple[type[Exception], ...] = (
            self._runtime.CUDARuntimeError,
            self._cupy.cuda.driver.CUDADriverError,
        )
        try:
            gpu, self._stream = self._opened()
        except self.failures as error:
            words = " ".join(str(error).split())
            raise UsageError(
                f"device cuda:{index} cannot be opened: {words}; nvidia-smi lists its processes"
            ) from error
        self.name, self.uuid, self.memory_bytes, self.sms = gpu.name, gpu.uuid, gpu.memory_bytes, gpu.sms
        self.compute_capability, self.shared_bytes = gpu.compute_capability, gpu.shared_bytes
        self._nvrtc = usable_nvrtc(self._cupy)
        self._binaries = CubinCache(folder)
        self._modules: dict[str, Any] = {}
        self._kernels: dict[str, Any] = {}
        self._shared: dict[str, int] = {}
        self._buffers: set[CupyBuffer] = set()

    def _opened(self) -> tuple[GpuProperties, Any]:
        """Creates the CUDA context of this process."""
        gpu = gpu_properties(self._cupy, self._index)
        self._select()
        return gpu, self._cupy.cuda.Stream(non_blocking=True)

    @property
    def free_bytes(self) -> int:
        self._select()
        free: int = self._runtime.memGetInfo()[0]
        if self._cap_bytes is None:
            return free
        held = tuple(self._buffers)  # any thread may free weights
        return max(0, min(free, self._cap_bytes - sum(buffer.n_bytes for buffer in held)))

    def prepare(self, kernels: Iterable[str]) -> None:
        self._select()
        for name in kernels:
            self._kernel(name)

    def allocate(self, n_bytes: int) -> CupyBuffer:
        free = self.free_bytes
        try:
            if n_bytes > free:
                raise InsufficientMemoryError(self._memory_error_text(n_bytes, free))
            self._select()
            address = self._runtime.malloc(max(n_bytes, 1))
        except self._runtime.CUDARuntimeError as error:
            if error.status != _OUT_OF_MEMORY:
                raise
            raise InsufficientMemoryError(self._memory_error_text(n_bytes, free)) from error
        buffer = CupyBuffer(self, address, n_bytes)
        self._buffers.add(buffer)
        return buffer

    def free(self, buffer: CupyBuffer) -> None:
        if buffer in self._buffers:
            self._buffers.remove(buffer)
            with suppress(*self.failures):  # a lost GPU fails every call; its users get the error
                self._select()
                self._runtime.free(buffer.address)
            buffer.address = 0

    def pinned(self, n_bytes: int) -> Bytes:
        self._select()
        try:
            memory = self._cupy.cuda.PinnedMemory(max(n_bytes, 1))
        except self._runtime.CUDARuntimeError as error:
            if error.status != _OUT_OF_MEMORY:
                raise
            raise InsufficientMemoryError(f"{mib(n_bytes)} MiB of RAM cannot be pinned for {self.name}") from error
        return np.frombuffer(self._cupy.cuda.PinnedMemoryPointer(memory, 0), np.uint8, n_bytes)

    def upload(self, buffer: Buffer, offset_bytes: int, data: Bytes) -> None:
        self._copy_in(buffer, offset_bytes, np.ascontiguousarray(data))
        self.synchronize()

    def download(self, buffer: Buffer, offset_bytes: int, n_bytes: int) -> Bytes:
        data: Bytes = np.empty(n_bytes, np.uint8)
        self.copy_out(data, buffer, offset_bytes)
        self.synchronize()
        return data

    def copy_in(self, buffer: Buffer, offset_bytes: int, pinned: Bytes) -> None:
        assert pinned.flags.c_contiguous
        self._copy_in(buffer, offset_bytes, pinned)

    def _copy_in(self, buffer: Buffer, offset_bytes: int, data: Bytes) -> None:
        to, runtime = _part(buffer, offset_bytes, data.nbytes), self._runtime
        self._select()
        runtime.memcpyAsync(to, data.ctypes.data, data.nbytes, runtime.memcpyHostToDevice, self._stream.ptr)

    def copy_out(self, pinned: Bytes, buffer: Buffer, offset_bytes: int) -> None:
        assert pinned.flags.c_contiguous
        begin, runtime = _part(buffer, offset_bytes, pinned.nbytes), self._runtime
        self._select()
        runtime.memcpyAsync(pinned.ctypes.data, begin, pinned.nbytes, runtime.memcpyDeviceToHost, self._stream.ptr)

    def launch(self, launch: Launch) -> None:
        self._select()
        kernel = self._kernel(launch.kernel)
        self._allow_shared(kernel, launch)
        kernel(launch.grid, launch.block, launch.args, shared_mem=launch.shared_bytes, stream=self._stream)

    def _allow_shared(self, kernel: Any, launch: Launch) -> None:
        """More than 48 KiB need an attribute, set once."""
        if launch.shared_bytes > max(PLAIN_SHARED_BYTES, self._shared.get(launch.kernel, 0)):
            kernel.max_dynamic_shared_size_bytes = launch.shared_bytes
            self._shared[launch.kernel] = launch.shared_bytes

    def capture(self, work: Callable[[], None]) -> CupyGraph:
        self._select()
        self._stream.begin_capture()
        try:
            work()
        except BaseException:
            with suppress(self._runtime.CUDARuntimeError):  # the first error counts
                self._stream.end_capture()
            raise
        return CupyGraph(self, self._stream.end_capture())

    def replay(self, graph: Any) -> None:
        self._select()
        graph.launch(stream=self._stream)

    def event(self) -> CupyEvent:
        self._select()
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(self._stream)
        return CupyEvent(event)

    def synchronize(self) -> None:
        self._select()
        self._stream.synchronize()

    def close(self) -> None:
        self.synchronize()
        for buffer in list(self._buffers):
            self.free(buffer)
        self._kernels.clear()
        self._modules.clear()
        self._binaries.close()

    def _select(self) -> None:
        """CUDA calls use the GPU that the thread selected last."""
        self._runtime.setDevice(self._index)

    def _kernel(self, name: str) -> Any:
        if name not in self._kernels:
            module, _, function = name.rpartition(".")
            self._kernels[name] = self._function(module, function)
        return self._kernels[name]

    def _function(self, module: str, function: str) -> Any:
        """If the driver rejects a file, such as a truncated one, the module is compiled again."""
        if module not in self._modules:
            self._modules[module] = self._module(module)
        try:
            return self._modules[module].get_function(function)
        except self._cupy.cuda.driver.CUDADriverError as error:
            _log.warning("kernels %s cannot be loaded: %s; they are compiled anew", module, error)
            self._modules[module] = self._module(module, anew=True)
            return self._modules[module].get_function(function)

    def _module(self, name: str, *, anew: bool = False) -> Any:
        """Its file is read at the first function."""
        major, minor = self.compute_capability
        text = whole_text(modules()[name])
        path = self._binaries.get(self._nvrtc, name, text, 10 * major + minor, anew=anew)
        return self._cupy.RawModule(path=str(path))

    def _memory_error_text(self, n_bytes: int, free_bytes: int) -> str:
        what = f"{mib(n_bytes)} MiB are needed, {free_bytes // MIB} MiB are free"
        cap = "" if self._cap_bytes is None else f" of the {self._cap_bytes // MIB} MiB that may be used"
        return f"{self.name}: {what}{cap}; take fewer layers or a shorter context"
