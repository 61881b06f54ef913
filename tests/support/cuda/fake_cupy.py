"""A fake CuPy in host memory: it records kernel launches, and runs a stream's work when the stream is synchronized."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llamaclust.kernels.cuda.runtime.device import PLAIN_SHARED_BYTES
from llamaclust.kernels.cuda.runtime.nvrtc import Binary

_INVALID_VALUE = 1  # CUDA_ERROR_INVALID_VALUE


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


Work = Callable[[], None]


@dataclass
class FakeStream:
    """A stream that runs its work when it is synchronized."""

    queue: list[Work] = field(default_factory=list)
    captured: list[Work] | None = None
    ptr: int = 77

    def add(self, work: Work) -> None:
        (self.queue if self.captured is None else self.captured).append(work)

    def begin_capture(self) -> None:
        assert self.captured is None
        self.captured = []

    def end_capture(self) -> FakeGraph:
        assert self.captured is not None
        work, self.captured = self.captured, None
        return FakeGraph(work)

    def synchronize(self) -> None:
        assert self.captured is None
        for work in self.queue:
            work()
        self.queue.clear()


@dataclass
class FakeGraph:
    work: list[Work]

    def launch(self, stream: FakeStream) -> None:
        stream.queue += self.work

    def upload(self, stream: FakeStream) -> None:
        """Does nothing. A GPU needs memory for it."""


@dataclass
class FakeEvent:
    stream: FakeStream | None = None

    def record(self, stream: FakeStream) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        assert self.stream is not None
        self.stream.synchronize()


@dataclass
class FakeRuntime:
    """A CUDA runtime with GPUs of these compute capabilities; `getDeviceCount` raises any `status` but 0."""

    gpus: tuple[tuple[int, int], ...] = ((8, 6), (9, 0))
    status: int = 0
    driver: int = 13000
    free_bytes: int = 1 << 20
    chosen: int = -1
    memory: dict[int, Any] = field(default_factory=dict)
    stream: FakeStream = field(default_factory=FakeStream)
    CUDARuntimeError: type[CUDARuntimeError] = CUDARuntimeError
    memcpyHostToDevice: int = 1  # noqa: N815
    memcpyDeviceToHost: int = 2  # noqa: N815

    def getDeviceCount(self) -> int:  # noqa: N802
        if self.status != 0:
            raise CUDARuntimeError(self.status)
        return len(self.gpus)

    def driverGetVersion(self) -> int:  # noqa: N802
        return self.driver

    def runtimeGetVersion(self) -> int:  # noqa: N802
        return 13020

    def getDeviceProperties(self, index: int) -> dict[str, Any]:  # noqa: N802
        major, minor = self.gpus[index]
        return {
            "name": f"Card {index}".encode(),
            "uuid": bytes([index] * 16),
            "totalGlobalMem": 1 << 30,
            "major": major,
            "minor": minor,
            "multiProcessorCount": 100,
            "sharedMemPerBlockOptin": 99 << 10,
        }

    def setDevice(self, index: int) -> None:  # noqa: N802
        self.chosen = index

    def memGetInfo(self) -> tuple[int, int]:  # noqa: N802
        return self.free_bytes, 1 << 30

    def malloc(self, n_bytes: int) -> int:
        if n_bytes > self.free_bytes // 2:  # free memory is fragmented
            raise CUDARuntimeError(2)
        memory = (ctypes.c_uint8 * n_bytes)()
        self.memory[ctypes.addressof(memory)] = memory
        self.free_bytes -= n_bytes
        return ctypes.addressof(memory)

    def free(self, address: int) -> None:
        self.free_bytes += len(self.memory.pop(address))

    def memcpyAsync(self, to: int, begin: int, n_bytes: int, kind: int, stream: int) -> None:  # noqa: N802
        place = to if kind == self.memcpyHostToDevice else begin
        assert stream == self.stream.ptr
        assert any(at <= place and place + n_bytes <= at + len(memory) for at, memory in self.memory.items())

        def copy() -> None:
            ctypes.memmove(to, begin, n_bytes)

        self.stream.add(copy)


class CUDADriverError(RuntimeError):
    """A driver error: its status, or its message."""


@dataclass
class FakeKernel:
    """A kernel that may use 48 KiB of static and dynamic shared memory, until its attribute allows more."""

    name: str
    runtime: FakeRuntime
    launches: list[tuple[Any, ...]]
    kernel: SimpleNamespace
    shared_size_bytes: int

    def __post_init__(self) -> None:
        self.max_dynamic_shared_size_bytes = PLAIN_SHARED_BYTES - self.shared_size_bytes

    def __call__(self, grid: Any, block: Any, args: Any, *, shared_mem: int, stream: FakeStream) -> None:
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise CUDADriverError(_INVALID_VALUE)
        stream.add(lambda: self.launches.append((self.name, grid, block, args, shared_mem)))


class FakeNvrtc:
    """A compiler whose machine code is the module's name and its architecture."""

    version = (13, 0)
    architectures = (75, 90)

    def __init__(self) -> None:
        self.compiled: list[tuple[str, int]] = []

    def compile(self, name: str, text: str, architecture: int) -> Binary:
        assert f'#line 1 "{name.rpartition(".")[2]}.cu"' in text and "KERNEL" in text
        self.compiled.append((name, architecture))
        return Binary("cubin", f"{name} for {architecture}".encode())


class FakeCupy(SimpleNamespace):
    """A fake `cupy` module. `launches` are completed launches, `loaded` the binaries read from `files`, and `kernels`
    their functions, with `static_bytes` of static shared memory."""

    def __init__(self, runtime: FakeRuntime | None = None, version: str = "14.2.0") -> None:
        self.runtime = runtime or FakeRuntime()
        self.launches: list[tuple[Any, ...]] = []
        self.loaded: list[bytes] = []
        self.files: list[Path] = []
        self.kernels: list[FakeKernel] = []
        self.static_bytes = 1 << 10
        stream = self.runtime.stream
        self.cuda = SimpleNamespace(
            runtime=self.runtime,
            driver=SimpleNamespace(CUDADriverError=CUDADriverError),
            Stream=lambda non_blocking: stream,
            Event=lambda disable_timing: FakeEvent(),
            PinnedMemory=bytearray,
            PinnedMemoryPointer=lambda memory, offset: memoryview(memory)[offset:],
        )
        self.__version__ = version

    def RawModule(self, *, path: str) -> SimpleNamespace:  # noqa: N802
        self.files.append(Path(path))
        self.loaded.append(data := self.files[-1].read_bytes())

        def function(name: str) -> FakeKernel:
            if b" for " not in data:
                raise CUDADriverError("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid")
            pointer = SimpleNamespace(ptr=1000 + len(self.kernels))
            self.kernels.append(FakeKernel(name, self.runtime, self.launches, pointer, self.static_bytes))
            return self.kernels[-1]

        return SimpleNamespace(get_function=function)
