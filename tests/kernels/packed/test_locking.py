"""Tests of packed weights locked in RAM: bytes that the kernel counts as locked, and the message if a limit forbids
locking."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llamaclust.core.sizes import MIB
from llamaclust.kernels._native import Memory
from llamaclust.kernels.cpu.backend import CpuBackend
from llamaclust.kernels.packed import locking
from llamaclust.kernels.packed.locking import lock_memory
from llamaclust.model.loader import Model
from support.arithmetic.batches import load_stage
from support.models.tiny_model import build_tiny_model

_UNPRIVILEGED = """
import ctypes, logging, resource, sys
from llamaclust.kernels._native import Memory
from llamaclust.kernels.packed.locking import lock_memory
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert ctypes.CDLL(None).capset(header, sets) == 0, "without CAP_IPC_LOCK"
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_MEMLOCK, (min(limit, 65536), limit))
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s", level="INFO")
lock_memory([Memory(4 << 20), Memory(0), Memory(2 << 20)])
"""


def _locked_bytes() -> int:
    (kib,) = re.findall(r"^VmLck:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(kib) * 1024


def _unprivileged(limit: int) -> str:
    """Returns the message of `lock_memory` for 6 MiB in a process with this limit."""
    command = [sys.executable, "-c", _UNPRIVILEGED, str(limit)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_memory_is_locked_until_it_is_freed() -> None:
    before = _locked_bytes()
    memory = Memory(MIB)
    lock_memory([memory])
    assert _locked_bytes() - before == MIB
    del memory
    assert _locked_bytes() == before


def test_a_line_says_that_the_limit_is_too_small_and_what_to_do() -> None:
    said = _unprivileged(3 * MIB)
    assert said.startswith("WARNING mlock: 2 of 6 MiB of packed weights are locked in RAM: RLIMIT_MEMLOCK is 3 MiB; ")
    assert "LimitMEMLOCK=infinity" in said
    assert _unprivileged(8 * MIB) == "INFO 6 of 6 MiB of packed weights are locked in RAM", "the hard limit counts"


@pytest.mark.parametrize("mlock", [False, True])
def test_weights_of_a_stage_are_locked_if_wanted(tmp_path: Path, caplog: pytest.LogCaptureFixture, mlock: bool) -> None:
    before = _locked_bytes()
    with Model.open(build_tiny_model(tmp_path / "m.gguf")) as model, caplog.at_level(logging.INFO, locking.__name__):
        stage = load_stage(CpuBackend(1, mlock=mlock), model)
        assert (_locked_bytes() > before) == mlock
        assert ("of packed weights are locked in RAM" in caplog.text) == mlock
        stage.close()
