"""The interface of a GPU: memory, copies, launches and graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

Scalar = np.int32 | np.float32 | np.float64 | np.uint64
"""An argument of a kernel in the argument's declared type. Pointers are addresses as np.uint64 (see `Buffer.at`)."""

NULL = np.uint64(0)

MIN_COMPUTE_CAPABILITY = (6, 1)
"""The oldest supported GPUs, the first with four-byte dot products. 8-bit matrix instructions and CUDA 13 need 7.5."""

LEAST_SHARED_BYTES = 64 << 10
"""The smallest `Device.shared_bytes` of any GPU since 7.0. Older GPUs have PLAIN_SHARED_BYTES."""

PLAIN_SHARED_BYTES = 48 << 10
"""The default limit of a block's shared memory. Kernels must request more as dynamic, up to `Device.shared_bytes`."""


class Buffer(Protocol):
    """Device memory with an alignment of at least 16 bytes. Its initial content is undefined."""

    address: int
    n_bytes: int

    def at(self, offset_bytes: int = 0) -> np.uint64:
        """Returns a pointer into the buffer for kernels. Raises AssertionError if the pointer is outside."""

    def close(self) -> None:
        """Frees the memory. No launch in progress may use the memory."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of the kernel "module.kernel". Module `elementwise.rows` is src/elementwise/rows.cu."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    args: tuple[Scalar, ...]
    shared_bytes: int = 0  # dynamic shared memory
    in_order: bool = False  # begins when all before it have ended, even if its kernel could begin earlier


class Graph(Protocol):
    """Captured launches and copies. Each execution copies the current content of pinned memory."""

    def launch(self) -> None: ...

    def close(self) -> None: ...


class Event(Protocol):
    def synchronize(self) -> None: ...


class Device(Protocol):
    """One GPU. Copies, launches and graphs run in the order of the calls, which return before the work is done. Only
    one thread may make calls at a time. `prepare` and buffers' `close` are exceptions."""

    name: str
    uuid: str  # of the GPU itself; "": not known
    compute_capability: tuple[int, int]
    sms: int  # multiprocessors
    memory_bytes: int
    shared_bytes: int  # shared memory that a block can have at most
    failures: tuple[type[Exception], ...]  # errors of the driver, after which the device is lost

    @property
    def free_bytes(self) -> int:
        """The most bytes that `allocate` could provide now."""

    def prepare(self, kernels: Iterable[str]) -> None:
        """Compiles the kernels' modules (seconds, once on a machine). `launch` compiles too, but not in a capture."""

    def allocate(self, n_bytes: int) -> Buffer:
        """Raises InsufficientMemoryError if less memory is free."""

    def pinned(self, n_bytes: int) -> Bytes:
        """Allocates pinned host memory, which is freed with the array. Raises InsufficientMemoryError."""

    def upload(self, buffer: Buffer, offset_bytes: int, data: Bytes) -> None:
        """Copies `data` and waits until the copy is complete."""

    def copy_in(self, buffer: Buffer, offset_bytes: int, pinned: Bytes) -> None:
        """Copies in order with launches. `pinned` is from `Device.pinned` and must stay unchanged until copied."""

    def copy_in_background(self, buffer: Buffer, parts: Iterable[tuple[int, Bytes]]) -> Event:
        """Copies pinned memory to these offsets, not in order with launches. The event marks the end of all copies."""

    def copy_out(self, pinned: Bytes, buffer: Buffer, offset_bytes: int) -> None:
        """Fills `pinned` in order with launches. The data is complete after `synchronize` or a later event."""

    def launch(self, launch: Launch) -> None: ...

    def capture(self, work: Callable[[], None]) -> Graph:
        """Records the launches and copies of `work` without executing them."""

    def event(self) -> Event:
        """Returns an event that marks the end of all calls so far."""

    def synchronize(self) -> None: ...

    def close(self) -> None: ...
