from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from llamaclust.core.errors import InsufficientMemoryError, UsageError
from llamaclust.core.sizes import MIB, mib
from llamaclust.kernels.cuda.runtime.cupy_open import gpu_properties, import_cupy
from llamaclust.kernels.cuda.runtime.device import Buffer, Bytes, Event, Launch
from llamaclust.kernels.cuda.runtime.kernel_loader import KernelLoader
from llamaclust.kernels.cuda.runtime.overlap import OLDEST, OverlappingLauncher, overlaps

_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


@dataclass(eq=False, slots=True)
class CupyBuffer:
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
    device: CupyDevice
    graph: Any

    def launch(self) -> None:
        self.device.replay(self.graph)

    def close(self) -> None:
        self.graph = None


def _part(buffer: Buffer, offset_bytes: int, n_bytes: int) -> int:
    assert offset_bytes + n_bytes <= buffer.n_bytes, f"{offset_bytes} + {n_bytes} of {buffer.n_bytes} bytes"
    return int(buffer.at(offset_bytes))


class CupyDevice:
    def __init__(self, index: int = 0, memory_cap_bytes: int | None = None, folder: Path | None = None) -> None:
        """Raises UsageError, which says what is missing: CuPy, NVRTC, a driver, the GPU, a newer GPU, or a free GPU."""
        self._cupy = import_cupy()
        self._index, self._cap_bytes = index, memory_cap_bytes
        self._runtime = self._cupy.cuda.runtime
        self.failures: tuple[type[Exception], ...] = (
            self._runtime.CUDARuntimeError,
            self._cupy.cuda.driver.CUDADriverError,
        )
        try:
            gpu = gpu_properties(self._cupy, index)
            self._select()  # Creates this process's CUDA context.
            self._stream = self._cupy.cuda.Stream(non_blocking=True)
            self._background = self._cupy.cuda.Stream(non_blocking=True)
        except self.failures as error:
            words = " ".join(str(error).split())
            raise UsageError(
                f"device cuda:{index} cannot be opened: {words}; nvidia-smi lists the GPU's processes"
            ) from error
        self.name, self.uuid, self.memory_bytes, self.sms = gpu.name, gpu.uuid, gpu.memory_bytes, gpu.sms
        self.compute_capability, self.shared_bytes = gpu.compute_capability, gpu.shared_bytes
        self._kernels = KernelLoader(self._cupy, gpu.compute_capability, folder)
        self._overlapping = OverlappingLauncher(self._cupy.cuda.driver.CUDADriverError)
        self._buffers: set[CupyBuffer] = set()

    @property
    def free_bytes(self) -> int:
        self._select()
        free: int = self._runtime.memGetInfo()[0]
        if self._cap_bytes is None:
            return free
        held = tuple(self._buffers)  # A copy, because any thread may free weights meanwhile.
        return max(0, min(free, self._cap_bytes - sum(buffer.n_bytes for buffer in held)))

    def prepare(self, kernels: Iterable[str]) -> None:
        self._select()
        for name in kernels:
            self._kernels.get(name)

    def allocate(self, n_bytes: int) -> CupyBuffer:
        free = self.free_bytes
        cap = "" if self._cap_bytes is None else f" of the {self._cap_bytes // MIB} MiB that may be used"
        what = f"{mib(n_bytes)} MiB are needed, but {free // MIB} MiB are free{cap}"
        message = f"{self.name}: {what}; take fewer layers or a shorter context"
        if n_bytes > free:
            raise InsufficientMemoryError(message)
        with self._out_of_memory(message):
            buffer = CupyBuffer(self, self._runtime.malloc(max(n_bytes, 1)), n_bytes)
        self._buffers.add(buffer)
        return buffer

    @contextmanager
    def _out_of_memory(self, message: str) -> Iterator[None]:
        try:
            yield
        except self._runtime.CUDARuntimeError as error:
            if error.status != _OUT_OF_MEMORY:
                raise
            raise InsufficientMemoryError(message) from error

    def free(self, buffer: CupyBuffer) -> None:
        if buffer in self._buffers:
            self._buffers.remove(buffer)
            with suppress(*self.failures):  # Every call fails after a GPU is lost. The users of the GPU get the error.
                self._select()
                self._runtime.free(buffer.address)
            buffer.address = 0

    def pinned(self, n_bytes: int) -> Bytes:
        self._select()
        with self._out_of_memory(f"{mib(n_bytes)} MiB of RAM cannot be pinned for {self.name}"):
            memory = self._cupy.cuda.PinnedMemory(max(n_bytes, 1))
        return np.frombuffer(self._cupy.cuda.PinnedMemoryPointer(memory, 0), np.uint8, n_bytes)

    def upload(self, buffer: Buffer, offset_bytes: int, data: Bytes) -> None:
        self.copy_in(buffer, offset_bytes, np.ascontiguousarray(data))
        self.synchronize()

    def copy_in(self, buffer: Buffer, offset_bytes: int, pinned: Bytes) -> None:
        self._copy_in(buffer, offset_bytes, pinned, self._stream)

    def copy_in_background(self, buffer: Buffer, parts: Iterable[tuple[int, Bytes]]) -> Event:
        for offset_bytes, pinned in parts:
            self._copy_in(buffer, offset_bytes, pinned, self._background)
        return self._event(self._background)

    def _copy_in(self, buffer: Buffer, offset_bytes: int, pinned: Bytes, stream: Any) -> None:
        assert pinned.flags.c_contiguous
        to, runtime = _part(buffer, offset_bytes, pinned.nbytes), self._runtime
        self._select()
        runtime.memcpyAsync(to, pinned.ctypes.data, pinned.nbytes, runtime.memcpyHostToDevice, stream.ptr)

    def copy_out(self, pinned: Bytes, buffer: Buffer, offset_bytes: int) -> None:
        assert pinned.flags.c_contiguous
        begin, runtime = _part(buffer, offset_bytes, pinned.nbytes), self._runtime
        self._select()
        runtime.memcpyAsync(pinned.ctypes.data, begin, pinned.nbytes, runtime.memcpyDeviceToHost, self._stream.ptr)

    def launch(self, launch: Launch) -> None:
        self._select()
        kernel = self._kernels.get(launch.kernel, launch.shared_bytes)
        if self._kernels.architecture >= OLDEST and overlaps(launch.kernel) and not launch.in_order:
            self._overlapping.launch(kernel.kernel.ptr, launch, self._stream.ptr)
        else:
            kernel(launch.grid, launch.block, launch.args, shared_mem=launch.shared_bytes, stream=self._stream)

    def capture(self, work: Callable[[], None]) -> CupyGraph:
        self._select()
        self._stream.begin_capture()
        try:
            work()
        except BaseException:
            with suppress(self._runtime.CUDARuntimeError):  # Only the first error matters.
                self._stream.end_capture()
            raise
        with self._out_of_memory(f"{self.name} has too little free memory for a CUDA graph"):
            graph = self._stream.end_capture()
            graph.upload(stream=self._stream)
        return CupyGraph(self, graph)

    def replay(self, graph: Any) -> None:
        self._select()
        graph.launch(stream=self._stream)

    def event(self) -> Event:
        return self._event(self._stream)

    def _event(self, stream: Any) -> Event:
        self._select()
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(stream)
        return cast(Event, event)

    def synchronize(self) -> None:
        self._select()
        self._stream.synchronize()

    def close(self) -> None:
        self.synchronize()
        for buffer in list(self._buffers):
            self.free(buffer)
        self._kernels.close()

    def _select(self) -> None:
        self._runtime.setDevice(self._index)
