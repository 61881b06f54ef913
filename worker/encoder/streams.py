"""The streams of one loaded image encoder. A separate thread computes image tiles in the order of arrival."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from llamaclust.core.errors import RequestError
from llamaclust.core.limits import MAX_TILE_PIXELS
from llamaclust.wire.encoder import COMPUTING, decode_tile, encode_refusal, row_frames, tile_bytes
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.server import ServerStream
from llamaclust.worker.encoder.tile_encoder import TileEncoder
from llamaclust.worker.stage.compute import Compute

_BEGIN_S = 15.0
"""Maximum number of seconds until the first bytes of the next image tile arrive."""
_TILE_S = 120.0
_FRAME_S = 30.0
_COMPUTING_S = 5.0
"""Seconds between COMPUTING frames while a tile waits or is computed. The frames keep the client from giving up."""


class EncoderStreams:
    """Serves the streams of an encoder for one epoch at a time. A stream has at most one waiting tile."""

    def __init__(self, encoder: TileEncoder, compute: Compute) -> None:
        """`compute` must not be shared with a stage, whose steps would wait for image tiles."""
        self.encoder = encoder
        self._compute = compute
        self._turn = asyncio.Lock()  # Held while a tile is computed, even after its stream was cancelled.
        self._serving = set[asyncio.Task[object]]()

    async def serve(self, stream: ServerStream) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            await self._serve(stream)
        finally:
            self._serving.discard(task)

    async def _serve(self, stream: ServerStream) -> None:
        stream.limit(tile_bytes(min(self.encoder.projector.max_tile_pixels, MAX_TILE_PIXELS)))
        await stream.accept()
        while True:
            async with deadline("the first bytes of an image tile", _BEGIN_S):
                await stream.begin()
            async with deadline("an image tile", _TILE_S):
                data = await stream.read()
            if data is None:
                return
            for frame in await self._computed(stream, decode_tile(data)):
                async with deadline("sending an image's rows", _FRAME_S):
                    await stream.write(frame)

    async def _computed(self, stream: ServerStream, tile: NDArray[np.uint8]) -> Iterable[bytes]:
        answering = asyncio.create_task(self._answer(tile))
        try:
            while not (await asyncio.wait((answering,), timeout=_COMPUTING_S))[0]:
                async with deadline("sending an image's rows", _FRAME_S):
                    await stream.write(COMPUTING)
            return answering.result()
        finally:
            answering.cancel()

    async def _answer(self, tile: NDArray[np.uint8]) -> Iterable[bytes]:
        await self._turn.acquire()
        computed = self._compute.queue(partial(self.encoder.rows, tile))
        computed.add_done_callback(lambda _: self._turn.release())
        try:
            return row_frames(await asyncio.shield(computed))
        except RequestError as error:
            return (encode_refusal(str(error)),)

    @property
    def is_computing(self) -> bool:
        return self._turn.locked()

    def end(self) -> None:
        """Ends all streams, but keeps the encoder loaded for a later epoch."""
        for task in self._serving:
            task.cancel()

    def close(self) -> asyncio.Future[None]:
        """Ends all streams. The future is done when the tile in progress is computed and the memory is freed."""
        self.end()
        freed = self._compute.queue(self.encoder.close)
        self._compute.close()
        return freed
