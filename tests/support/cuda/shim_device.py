"""A GPU shim: kernels run on the CPU, and a launch fails if its kernel makes a mistake."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.kernels.cuda.runtime.device import Buffer, Bytes, Launch, Scalar

_LETTERS: dict[str, type[Scalar]] = {"p": np.uint64, "i": np.int32, "f": np.float32, "d": np.float64}
_MAX_KERNELS, _PROBLEM_BYTES = 10_000, 1000
LARGEST_GRID = (1 << 31) - 1, 65535, 65535


class KernelError(AssertionError):
    """An error of a kernel or of its launch."""


@dataclass(frozen=True, slots=True)
class _Kernel:
    index: int
    parameters: tuple[type[Scalar], ...]
    max_threads: int


@dataclass(eq=False, slots=True)
class ShimBuffer:
    """A buffer in host memory, with gaps before and after it."""

    device: ShimDevice
    address: int
    n_bytes: int

    def at(self, offset_bytes: int = 0) -> np.uint64:
        assert self.address != 0, "a buffer that was closed"
        assert 0 <= offset_bytes <= self.n_bytes, f"{offset_bytes} of {self.n_bytes} bytes"
        return np.uint64(self.address + offset_bytes)

    def close(self) -> None:
        self.device.free(self)


def _view(buffer: Buffer, offset_bytes: int, n_bytes: int) -> Bytes:
    assert offset_bytes + n_bytes <= buffer.n_bytes, f"{offset_bytes} + {n_bytes} of {buffer.n_bytes} bytes"
    memory = (ctypes.c_uint8 * n_bytes).from_address(int(buffer.at(offset_bytes)))
    return np.ctypeslib.as_array(memory)


@dataclass(slots=True)
class ShimGraph:
    work: list[Callable[[], None]]

    def launch(self) -> None:
        for one in self.work:
            one()

    def close(self) -> None:
        self.work = []


class ShimEvent:
    def synchronize(self) -> None:
        """Does nothing, since the shim does all work at once."""


@dataclass(eq=False)
class ShimDevice:
    """A `runtime.device.Device` that raises KernelError where a GPU would report an error or compute a wrong number."""

    library: Path
    memory_bytes: int = 1 << 30
    compute_capability: tuple[int, int] = (9, 0)
    sms: int = 4
    shared_bytes: int = 227 << 10
    name: str = "no GPU"
    uuid: str = ""
    launches: int = 0
    failures: tuple[type[Exception], ...] = ()
    _buffers: set[ShimBuffer] = field(default_factory=set)
    _captured: list[Callable[[], None]] | None = None

    def __post_init__(self) -> None:
        self._native = ctypes.CDLL(str(self.library))
        self._native.shim_allocate.restype = ctypes.c_void_p
        self._native.shim_allocate.argtypes = [ctypes.c_size_t]
        self._native.shim_free.argtypes = [ctypes.c_void_p]
        self._native.shim_damaged.restype = ctypes.c_bool
        self._native.shim_kernel.restype = ctypes.c_bool
        self._kernels = self._read_kernels()

    def _read_kernels(self) -> dict[str, _Kernel]:
        found: dict[str, _Kernel] = {}
        for index in range(_MAX_KERNELS):
            name, parameters, threads = ctypes.c_char_p(), ctypes.c_char_p(), ctypes.c_int()
            if not self._native.shim_kernel(index, *map(ctypes.byref, (name, parameters, threads))):
                break
            assert name.value is not None and parameters.value is not None
            letters = parameters.value.decode()
            found[name.value.decode()] = _Kernel(index, tuple(_LETTERS[one] for one in letters), threads.value)
        return found

    @property
    def kernels(self) -> Sequence[str]:
        return sorted(self._kernels)

    @property
    def free_bytes(self) -> int:
        return self.memory_bytes - sum(buffer.n_bytes for buffer in self._buffers)

    def prepare(self, kernels: Iterable[str]) -> None:
        for name in kernels:
            self._kernel(name)

    def allocate(self, n_bytes: int) -> ShimBuffer:
        assert self._captured is None, "memory is not allocated while a graph is captured"
        if n_bytes > self.free_bytes:
            raise InsufficientMemoryError(f"{n_bytes} bytes of the shim's {self.free_bytes}")
        buffer = ShimBuffer(self, self._native.shim_allocate(n_bytes), n_bytes)
        self._buffers.add(buffer)
        return buffer

    def free(self, buffer: ShimBuffer) -> None:
        if buffer in self._buffers:
            self._buffers.remove(buffer)
            self._native.shim_free(buffer.address)
            buffer.address = 0

    def pinned(self, n_bytes: int) -> Bytes:
        return np.full(n_bytes, 0xFF, np.uint8)

    def upload(self, buffer: Buffer, offset_bytes: int, data: Bytes) -> None:
        assert self._captured is None, "a graph has no uploads: copy_in"
        _view(buffer, offset_bytes, data.nbytes)[:] = data.reshape(-1).view(np.uint8)

    def copy_in(self, buffer: Buffer, offset_bytes: int, pinned: Bytes) -> None:
        place = _view(buffer, offset_bytes, pinned.nbytes)
        self._do(lambda: np.copyto(place, pinned))

    def copy_in_background(self, buffer: Buffer, parts: Iterable[tuple[int, Bytes]]) -> ShimEvent:
        """Copies at once, even during a capture; the graph does not include the copy."""
        for offset_bytes, pinned in parts:
            np.copyto(_view(buffer, offset_bytes, pinned.nbytes), pinned)
        return ShimEvent()

    def copy_out(self, pinned: Bytes, buffer: Buffer, offset_bytes: int) -> None:
        place = _view(buffer, offset_bytes, pinned.nbytes)
        self._do(lambda: np.copyto(pinned, place))

    def launch(self, launch: Launch) -> None:
        kernel = self._kernel(launch.kernel)
        self._check(launch, kernel)
        self._do(lambda: self._launch(launch, kernel))

    def capture(self, work: Callable[[], None]) -> ShimGraph:
        assert self._captured is None, "a graph within a graph"
        self._captured = []
        try:
            work()
            return ShimGraph(self._captured)
        finally:
            self._captured = None

    def event(self) -> ShimEvent:
        assert self._captured is None, "an event within a graph"
        return ShimEvent()

    def synchronize(self) -> None:
        assert self._captured is None, "no synchronization while a graph is captured"

    def close(self) -> None:
        for buffer in list(self._buffers):
            self.free(buffer)

    def _do(self, work: Callable[[], None]) -> None:
        if self._captured is not None:
            self._captured.append(work)
        else:
            work()

    def _kernel(self, name: str) -> _Kernel:
        if name not in self._kernels:
            raise KernelError(f"no kernel {name}; there is {', '.join(self.kernels)}")
        return self._kernels[name]

    def _check(self, launch: Launch, kernel: _Kernel) -> None:
        given = tuple(type(one) for one in launch.args)
        if given != kernel.parameters:
            wanted, found = ([kind.__name__ for kind in kinds] for kinds in (kernel.parameters, given))
            raise KernelError(f"{launch.kernel} takes {wanted}, not {found}")
        x, y, z = launch.block
        if x * y * z > kernel.max_threads:
            raise KernelError(f"{launch.kernel} is made for blocks of {kernel.max_threads} threads, not {launch.block}")
        if launch.shared_bytes > self.shared_bytes:
            raise KernelError(f"{launch.kernel}: {launch.shared_bytes} bytes of shared memory, of {self.shared_bytes}")
        if not all(0 < size <= limit for size, limit in zip(launch.grid, LARGEST_GRID, strict=True)):
            raise KernelError(f"{launch.kernel}: a grid of {launch.grid}")

    def _launch(self, launch: Launch, kernel: _Kernel) -> None:
        self.launches += 1
        values = [np.array(one) for one in launch.args]
        args = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        grid, block = ((ctypes.c_uint * 3)(*sizes) for sizes in (launch.grid, launch.block))
        problem = ctypes.create_string_buffer(_PROBLEM_BYTES)
        shared_bytes, room = ctypes.c_size_t(launch.shared_bytes), ctypes.c_size_t(_PROBLEM_BYTES)
        self._native.shim_launch(kernel.index, grid, block, shared_bytes, args, problem, room)
        if problem.value:
            raise KernelError(f"{launch.kernel}: {problem.value.decode()}")
        if self._native.shim_damaged():
            raise KernelError(f"{launch.kernel} wrote beside a buffer")
