"""Fixtures of tests of GPU benchmarks."""

from __future__ import annotations

from typing import Any

import pytest

from llamaclust.kernels.cuda.backend import CudaBackend
from llamaclust.worker.devices import backends
from support.cuda.shim_build import build
from support.cuda.shim_device import ShimDevice


@pytest.fixture
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces GPUs by the shim, unless a real GPU is tested."""
    if request.config.getoption("--gpu", default=False):
        return

    def open_gpu(
        name: str, threads: int, cap: int | None, *folders: object, graphs: bool = True, **more: object
    ) -> Any:
        return CudaBackend(name, ShimDevice(build(), memory_bytes=cap or 1 << 30, sms=1), threads, graphs=graphs)

    monkeypatch.setattr(backends, "open_gpu", open_gpu)
