"""A device in turns: who uses it, one thread at a time, and what is said where it computes no more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from llamaclust.core.errors import DeviceLostError
from llamaclust.kernels.cuda.device import Device


class Turns:
    """Of one device, by its name among the worker's."""

    def __init__(self, name: str, device: Device) -> None:
        self._name = name
        self._device = device
        self._lock = Lock()

    @contextmanager
    def one(self) -> Iterator[None]:
        """A thread's turn: what it asks of the device stands together. DeviceLostError with the driver's words."""
        with self._lock, self.watched():
            yield

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What may come between: DeviceLostError likewise."""
        try:
            yield
        except self._device.failures as error:
            words = " ".join(str(error).split())
            raise DeviceLostError(f"{self._name} ({self._device.name}) is lost: {words}") from error
