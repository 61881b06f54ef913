"""Tests that threads of the image encoder have a lower priority than those of stages."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from threading import get_native_id
from time import sleep

import pytest

from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.devices.encoder_limits import ENCODER_NICENESS
from llamaclust.worker.stage.compute import Compute

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority for each thread")

LOW = min(os.getpriority(os.PRIO_PROCESS, 0) + ENCODER_NICENESS, 19)


def niceness(thread: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, thread)


def threads() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/task").iterdir()}


def started(make: Callable[[], object]) -> tuple[object, list[int]]:
    """Returns the result of `make`, and the niceness of the two threads that it started and that still run."""
    before = threads()
    made = make()
    while len(new := threads() - before) > 2:  # the thread that started them is about to end
        sleep(0.01)
    return made, [niceness(thread) for thread in new]


def test_threads_of_the_encoder_have_a_low_priority() -> None:
    """The calling thread, which keeps its priority, is the third one."""
    backend, own = started(lambda: CpuBackend(3))
    assert isinstance(backend, CpuBackend)
    usual = niceness(0)
    assert own == [usual] * 2
    device = Device("cpu", 3, "", None, backend)
    apart, lowered = started(lambda: device.encoder_backend)
    assert apart is not backend
    assert lowered == [LOW] * 2
    assert started(backend.apart)[1] == [usual] * 2
    assert niceness(0) == usual


async def test_the_thread_that_computes_tiles_has_a_low_priority() -> None:
    compute = Compute(inline=False)
    encoders = compute.apart(ENCODER_NICENESS)
    for each, wanted in ((compute, niceness(0)), (encoders, LOW)):
        assert await each.queue(lambda: niceness(get_native_id())) == wanted
        each.close()
