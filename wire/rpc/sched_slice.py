"""Time slices of threads. Threads that only forward messages request short slices (Linux 6.12 or newer)."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from collections.abc import Iterator
from contextlib import contextmanager

USUAL_SLICE_NS = 0
SHORT_SLICE_NS = 100_000

_CALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}  # Numbers of the system calls sched_setattr and sched_getattr.
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")  # struct sched_attr: size, policy, flags, nice, priority, runtime, ...


def request_slices(slice_ns: int) -> None:
    """Sets the time slice of the calling thread, and of threads and processes that it starts later."""
    attributes = _attributes(0)
    if attributes is not None:
        size, policy, flags, nice, priority, _, deadline, period = attributes
        packed = _ATTRIBUTES.pack(size, policy, flags, nice, priority, slice_ns, deadline, period)
        _call(0, 0, ctypes.create_string_buffer(packed), 0)


@contextmanager
def short_slices() -> Iterator[None]:
    request_slices(SHORT_SLICE_NS)
    try:
        yield
    finally:
        request_slices(USUAL_SLICE_NS)


def _attributes(thread_id: int) -> tuple[int, ...] | None:
    buffer = ctypes.create_string_buffer(_ATTRIBUTES.size)
    if not _call(1, thread_id, buffer, _ATTRIBUTES.size, 0):
        return None
    attributes = _ATTRIBUTES.unpack(buffer.raw)
    return attributes if attributes[1] == os.SCHED_OTHER else None


def _call(which: int, *arguments: object) -> bool:
    calls = _CALLS.get(platform.machine())
    if os.uname().sysname != "Linux" or calls is None:
        return False
    return bool(ctypes.CDLL(None).syscall(calls[which], *arguments) == 0)
