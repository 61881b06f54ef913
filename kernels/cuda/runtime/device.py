"""The interface of a GPU: memory, copies, launches and graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

Scalar = np.int32 | np.float32 | np.float64 | np.uint64
"""A kernel's argument, in the type that the kernel declares. Pointers are addresses as np.uint64 (see `Buffer.at`)."""

NULL = np.uint64(0)

MIN_COMPUTE_CAPABILITY = (6, 1)
"""The oldest supported compute capability, which is the first with four-byte dot products."""

LEAST_SHARED_BYTES = 64 << 10
"""The minimum of `Device.shared_bytes` since compute capability 7.0. Older GPUs have PLAIN_SHARED_BYTES."""

PLAIN_SHARED_BYTES = 48 << 10
"""The default limit of a block's shared memory. A kernel must request more as dynamic memory."""


class Buffer(Protocol):
    """GPU memory, aligned to at least 16 bytes. Its initial content is undefined."""

    address: int
    n_bytes: int

    def at(self, offset_bytes: int = 0) -> np.uint64: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Launch:
    """A launch of a kernel. "elementwise.norms.add_rms_norm" means add_rms_norm in src/elementwise/norms.cu."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    args: tuple[Scalar, ...]
    shared_bytes: int = 0  # Bytes of dynamic shared memory.
    # True if the launch waits until all earlier launches have ended, even if its kernel could begin earlier.
    in_order: bool = False


class Graph(Protocol):
    """Captured launches and copies. Each execution copies the current content of pinned memory."""

    def launch(self) -> None: ...

    def close(self) -> None: ...


class Event(Protocol):
    def synchronize(self) -> None: ...


class Device(Protocol):
    """One GPU. Copies, launches and graphs run in the order of the calls, which return before the work is done. Only
    one thread may make calls at a time. Other threads may call only `prepare` and the `close` of buffers."""

    name: str
    uuid: str  # The hardware's id, or an empty string if it is not known.
    compute_capability: tuple[int, int]
    sms: int  # Number of multiprocessors.
    memory_bytes: int
    shared_bytes: int  # Maximum shared memory of a block.
    failures: tuple[type[Exception], ...]  # Errors of the driver, after which the device is lost.

    @property
    def free_bytes(self) -> int: ...

    def prepare(self, kernels: Iterable[str]) -> None:
        """Compiles the kernels' modules, which takes seconds. `launch` compiles too, but cannot do so in a capture."""

    def allocate(self, n_bytes: int) -> Buffer: ...

    def pinned(self, n_bytes: int) -> Bytes:
        """Allocates pinned host memory, which is freed with the array. Raises InsufficientMemoryError."""

    def upload(self, buffer: Buffer, offset_bytes: int, data: Bytes) -> None: ...

    def copy_in(self, buffer: Buffer, offset_bytes: int, pinned: Bytes) -> None:
        """Copies a pinned array to the GPU, in stream order. The array must not change before the copy is done."""

    def copy_in_background(self, buffer: Buffer, parts: Iterable[tuple[int, Bytes]]) -> Event:
        """Copies each (offset, pinned memory) of `parts` while launches run. The event marks the end of all copies."""

    def copy_out(self, pinned: Bytes, buffer: Buffer, offset_bytes: int) -> None:
        """Copies GPU memory to `pinned` in stream order. The data is complete after `synchronize` or a later event."""

    def launch(self, launch: Launch) -> None: ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """Records the launches and copies of `work` without executing them."""

    def event(self) -> Event: ...

    def synchronize(self) -> None: ...

    def close(self) -> None: ...
