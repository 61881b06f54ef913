"""Tests that threads of the image encoder have a lower priority than those of stages."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from threading import get_native_id

import pytest

from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.devices.encoder_limits import ENCODER_NICENESS
from llamaclust.worker.stage.compute import Compute
from support.clusters.command_line import eventually

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority for each thread"),
    pytest.mark.skipif(os.getpriority(os.PRIO_PROCESS, 0) > 0, reason="the tests' own priority is low"),
]

LOW = os.getpriority(os.PRIO_PROCESS, 0) + ENCODER_NICENESS


def niceness(thread: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, thread)


def lowered() -> set[int]:
    """Returns this process's threads whose priority is that of the encoder."""
    found = set()
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):
            if niceness(int(thread.name)) == LOW:
                found.add(int(thread.name))
    return found


def test_threads_of_the_encoder_have_a_low_priority() -> None:
    """The calling thread, which keeps its priority, is the third one."""
    before, usual = lowered(), niceness(0)
    device = Device("cpu", 3, "", None, backend := CpuBackend(3))
    assert lowered() <= before
    encoder = device.encoder_backend
    assert encoder is not backend
    eventually(lambda: len(lowered() - before) == 2, 60.0, "the end of the thread that started the two")
    before = lowered()
    stage = backend.apart()
    assert stage is not encoder and lowered() <= before
    assert niceness(0) == usual


async def test_the_thread_that_computes_tiles_has_a_low_priority() -> None:
    compute = Compute(inline=False)
    encoders = compute.apart(ENCODER_NICENESS)
    for each, wanted in ((compute, niceness(0)), (encoders, LOW)):
        assert await each.queue(lambda: niceness(get_native_id())) == wanted
        each.close()
