"""The encoder of images of an epoch, on one of its workers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.engine.pipeline import TileTask
from llamaclust.core.errors import WorkerError
from llamaclust.wire.encoder import RowsReader, encode_tile
from llamaclust.wire.rpc.client import ClientStream, Peer
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.methods import ENCODE

_OPEN_S = 30.0
_SEND_S = 120.0
"""The longest time in seconds to send one tile, which has up to 24 MiB."""
_FRAME_S = 30.0
"""The longest time between two frames of one tile's rows. The first frame comes once the tile is computed: the caller
limits that."""


class RemoteEncoder:
    """Implements `TileEncoder`. `peer` is the worker with the encoder of an epoch; the owner closes it."""

    def __init__(self, epoch: int, peer: Peer) -> None:
        self._epoch = epoch
        self._peer = peer

    async def rows(self, tasks: Sequence[TileTask]) -> AsyncGenerator[NDArray[np.float32]]:
        stream = self._peer.open(ENCODE, epoch=self._epoch)
        try:
            async with deadline(f"reaching the encoder of worker {self._peer.worker}", _OPEN_S, self._peer.worker):
                await self._peer.connected()
                await stream.opened()
            for task in tasks:
                yield await self._encoded(stream, task)
        finally:
            stream.cancel()

    async def _encoded(self, stream: ClientStream, task: TileTask) -> NDArray[np.float32]:
        worker, reader = self._peer.worker, RowsReader(task.rows, task.width)
        async with deadline(f"sending a tile to worker {worker}", _SEND_S, worker):
            await stream.write(encode_tile(task.tile))
        self._take(reader, await stream.read())
        while not reader.is_complete:
            async with deadline(f"rows of an image from worker {worker}", _FRAME_S, worker):
                self._take(reader, await stream.read())
        return reader.rows

    def _take(self, reader: RowsReader, frame: bytes | None) -> None:
        if frame is None:
            raise WorkerError(f"worker {self._peer.worker} ended the stream of its encoder", worker=self._peer.worker)
        reader.take(frame)
