"""Runs a model's image encoder in this process, on separate threads, so that the model's steps continue."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Self

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.engine.pipeline import TileTask
from llamaclust.core.errors import InsufficientMemoryError
from llamaclust.core.sizes import missing
from llamaclust.model.projectors.projector import Projector
from llamaclust.worker.devices.devices import Device
from llamaclust.worker.devices.encoder_memory import encoder_bytes
from llamaclust.worker.encoder.tile_encoder import TileEncoder


class LocalEncoder:
    def __init__(self, device: Device, projector: Projector) -> None:
        memory, free_bytes = encoder_bytes(projector, device.threads), device.free_memory_bytes
        if memory.total_bytes > free_bytes:
            what = f"{projector.file.path}: the image encoder needs {missing(memory.parts, free_bytes)}"
            raise InsufficientMemoryError(f"{what}; set mmproj to off")
        self._encoder = TileEncoder(device.encoder_backend, projector, memory, None, lambda done_bytes: None)
        self._thread = ThreadPoolExecutor(1, "images")

    @property
    def worker(self) -> str | None:
        return None

    async def rows(self, task: TileTask) -> NDArray[np.float32]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._encoder.rows, task.tile)

    def close(self) -> None:
        """Waits for the image tile that is being encoded, which may take seconds. Then closes the encoder."""
        self._thread.shutdown(cancel_futures=True)
        self._encoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
