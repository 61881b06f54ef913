"""A device in gpu_lock: who uses it, one thread at a time, and what is said where it computes no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from llamaclust.core.errors import DeviceLostError
from llamaclust.kernels.cuda.runtime.device import Device


class GpuLock:
    """Of one device, by its name among the worker's."""

    def __init__(self, name: str, device: Device) -> None:
        self._name = name
        self._device = device
        self._lock = Lock()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """A thread's turn: what it asks of the device stands together. DeviceLostError with the driver's words."""
        with self._lock, self.driver_errors():
            yield

    @contextmanager
    def driver_errors(self) -> Iterator[None]:
        """What may come between: DeviceLostError likewise."""
        try:
            yield
        except self._device.failures as error:
            words = " ".join(str(error).split())
            raise DeviceLostError(f"{self._name} ({self._device.name}) is lost: {words}") from error
