"""Opens the GPU, compares one kernel with NumPy, and prints versions. The exit status is 3 if only bits differ.

    python benchmarks/gpu_support/one_kernel.py
    python benchmarks/gpu_support/one_kernel.py --modules    # compiles all modules that are not in the cache

Tests of kernels have short time limits, in which no module should be compiled."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import closing, suppress
from importlib import import_module
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).parent.parent))

from gpu_support.cubins import compile_all
from gpu_support.record import software
from gpu_support.steps import DIFFERENT
from llamaclust.cli.interrupts import ends_in_one_line
from llamaclust.cluster.config.environment import environment
from llamaclust.kernels.cuda.runtime.cupy_device import CupyDevice
from llamaclust.kernels.cuda.runtime.device import Device, Launch
from llamaclust.kernels.cuda.runtime.nvrtc import open_nvrtc

KERNEL, _BLOCK_CHANNELS, _COLUMNS = "elementwise.rows.add_rows", 1024, 5001
_TEST_PACKAGES = ("pytest", "xdist", "pytest_asyncio", "pytest_timeout", "hypothesis", "psutil")
_QUERY_S = 20


def difference(device: Device) -> str:
    """Returns the first sum that has other bits on the device than in NumPy, or an empty string."""
    x, y = np.random.default_rng(7).standard_normal((2, _COLUMNS), np.float32)
    count, found = np.array([1], np.int32), np.empty_like(x)
    buffers = [device.allocate(data.nbytes) for data in (x, y, count)]
    for buffer, data in zip(buffers, (x, y, count), strict=True):
        device.upload(buffer, 0, data.view(np.uint8))
    left, right, rows = (buffer.at() for buffer in buffers)
    grid = -(-_COLUMNS // _BLOCK_CHANNELS), 1, 1
    device.launch(Launch(KERNEL, grid, (256, 1, 1), (left, right, np.int32(_COLUMNS), rows, left)))
    device.copy_out(found.view(np.uint8), buffers[0], 0)
    device.synchronize()
    for buffer in buffers:
        buffer.close()
    differ = np.flatnonzero(found.view(np.uint32) != (x + y).view(np.uint32))
    if not len(differ):
        return ""
    at = differ[0]
    return f"{KERNEL}: {len(differ)} of {_COLUMNS} sums differ, first {at}: {x[at]!r} + {y[at]!r} is {found[at]!r}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", action="store_true", help="compile all modules that are not in the cache")
    given = parser.parse_args()
    with suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(["nvidia-smi"], timeout=_QUERY_S, check=False)
    for package in _TEST_PACKAGES:
        import_module(package)
    print(json.dumps(software()), flush=True)
    folder = environment().kernels_dir
    with closing(CupyDevice(0, folder=folder)) as device:
        major, minor = device.compute_capability
        print(
            f"{device.name}, {major}.{minor}, {device.sms} multiprocessors, {device.free_bytes} bytes free", flush=True
        )
        if given.modules:
            compile_all(open_nvrtc(), 10 * major + minor, folder)
        found = difference(device)
    print(found or f"{KERNEL} has the bits of NumPy")
    return DIFFERENT if found else 0


if __name__ == "__main__":
    with ends_in_one_line():
        sys.exit(main())
