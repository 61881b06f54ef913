"""Sends image tiles to the image encoder, which runs on one of the workers."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.engine.pipeline import EncoderUnreachableError, TileTask
from llamaclust.core.errors import LlamaclustError, WorkerError
from llamaclust.wire.encoder import RowsReader, encode_tile
from llamaclust.wire.rpc.client import ClientStream, Peer
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.methods import ENCODE

_OPEN_S = 30.0
_SEND_S = 120.0
"""Maximum seconds to send an image tile, which has up to 24 MiB."""
_FRAME_S = 30.0
"""Maximum seconds between two frames. The worker sends empty frames until a tile is encoded."""


class RemoteEncoder:
    """Implements `PipelineEncoder` by calls to `peer`, the worker that has the encoder. The caller closes `peer`."""

    def __init__(self, epoch: int, peer: Peer) -> None:
        self._epoch = epoch
        self._peer = peer

    @property
    def worker(self) -> str | None:
        return self._peer.worker

    async def check(self) -> None:
        """Raises EncoderUnreachableError if no stream can be opened."""
        (await self._opened()).cancel()

    async def rows(self, task: TileTask) -> NDArray[np.float32]:
        stream = await self._opened()
        try:
            async with deadline(f"sending a tile to worker {self.worker}", _SEND_S, self.worker):
                await stream.write(encode_tile(task.tile))
            return await self._received(stream, RowsReader(task.rows, task.width))
        finally:
            stream.cancel()

    async def _opened(self) -> ClientStream:
        stream = self._peer.open(ENCODE, epoch=self._epoch)
        with ExitStack() as failing:
            failing.callback(stream.cancel)
            try:
                async with deadline(f"reaching the encoder of worker {self.worker}", _OPEN_S, self.worker):
                    await self._peer.connected()
                    await stream.opened()
            except LlamaclustError as error:
                raise EncoderUnreachableError(str(error), worker=self.worker) from error
            failing.pop_all()
        return stream

    async def _received(self, stream: ClientStream, reader: RowsReader) -> NDArray[np.float32]:
        while not reader.is_complete:
            async with deadline(f"receiving an encoded image from worker {self.worker}", _FRAME_S, self.worker):
                frame = await stream.read()
            if frame is None:
                raise WorkerError(f"worker {self.worker} ended the stream of its encoder", worker=self.worker)
            reader.take(frame)
        return reader.rows
