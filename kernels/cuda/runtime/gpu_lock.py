"""Lets one thread at a time use a GPU. Errors of the driver become DeviceLostError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from llamaclust.core.errors import DeviceLostError
from llamaclust.kernels.cuda.runtime.device import Device


class GpuLock:
    """The lock of one device. `name` is the device's name in the worker, such as "cuda:0"."""

    def __init__(self, name: str, device: Device) -> None:
        self.device = device
        self._name = name
        self._lock = Lock()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Lets one thread make several calls in a row. Turns errors of the driver into DeviceLostError."""
        with self._lock, self.driver_errors():
            yield

    @contextmanager
    def driver_errors(self) -> Iterator[None]:
        try:
            yield
        except self.device.failures as error:
            message = " ".join(str(error).split())
            raise DeviceLostError(f"{self._name} ({self.device.name}) is lost: {message}") from error
