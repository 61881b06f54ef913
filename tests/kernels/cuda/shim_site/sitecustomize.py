"""Replaces GPUs by the shim in worker processes with this folder on their path, since Python imports this module first.
PYTHON_TEST_LOSE_GPU=FILE: once FILE exists, the shim removes it and loses the GPU at the next launch, or at the call
that FILE names."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from llamaclust.core.errors import DeviceLostError
from llamaclust.kernels.cuda.backend import CudaBackend
from llamaclust.kernels.cuda.runtime.device import Launch
from llamaclust.kernels.packed.cache_folder import PackedCacheFolder
from llamaclust.worker.devices import backends
from llamaclust.worker.devices.backends import GpuBackend
from support.cuda.shim_build import build
from support.cuda.shim_device import ShimDevice

_MEMORY_BYTES = 256 << 20


class LostDevice(ShimDevice):
    """A shim device that is lost on demand."""

    def prepare(self, kernels: Iterable[str]) -> None:
        _lose_at("prepare")
        super().prepare(kernels)

    def launch(self, launch: Launch) -> None:
        _lose_at("launch")
        super().launch(launch)


def _lose_at(call: str) -> None:
    order = Path(os.environ["PYTHON_TEST_LOSE_GPU"])
    if order.exists() and (order.read_text() or "launch") == call:
        order.unlink()
        raise DeviceLostError("cuda:0 is lost: the test's own words")


def open_gpu(
    name: str,
    threads: int,
    memory_cap_bytes: int | None,
    packed_cache: PackedCacheFolder | None = None,
    kernels_dir: Path | None = None,
    *,
    graphs: bool = True,
) -> GpuBackend:
    kind = LostDevice if "PYTHON_TEST_LOSE_GPU" in os.environ else ShimDevice
    device = kind(build(), memory_bytes=min(memory_cap_bytes or _MEMORY_BYTES, _MEMORY_BYTES), sms=1)
    return CudaBackend(name, device, threads, packed_cache, graphs=graphs)


backends.open_gpu = open_gpu
