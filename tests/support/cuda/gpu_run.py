"""Runs on a real GPU: a plugin reports failures at once, and ends processes whose CUDA context is broken."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import pytest

from llamaclust.kernels.cuda.runtime.device import Device

BROKEN_CODE = 17


@dataclass(eq=False)
class GpuRun:
    """A pytest plugin: xdist's controller reports failures; workers with a broken context exit and are replaced."""

    device: Device | None = None
    has_failed: bool = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.has_failed = self.has_failed or report.failed
        if report.failed and not _is_worker():
            _tell(f"failed: {report.nodeid} ({report.when})")

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        device, has_failed, self.has_failed = self.device, self.has_failed, False
        if device is None or not has_failed or not _is_worker():
            return
        try:
            device.synchronize()
        except device.failures as error:
            _tell(f"the GPU's context is broken after {nodeid}: {error}")
            os._exit(BROKEN_CODE)


def _is_worker() -> bool:
    return "PYTEST_XDIST_WORKER" in os.environ


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
