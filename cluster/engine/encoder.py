"""Encodes tiles of images on the pipeline that serves. After a loss, another pipeline computes them with equal bits."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from contextlib import aclosing

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.engine.pipeline import TileEncoder, TileTask
from llamaclust.cluster.scheduler.strikes import MAX_STRIKES
from llamaclust.core.backoff import Backoff
from llamaclust.core.errors import LlamaclustError, RequestError, RequestFailedError, WorkerError
from llamaclust.model.projectors.projector import Projector
from llamaclust.wire.rpc.deadlines import deadline

_log = logging.getLogger(__name__)

_BACKOFF = Backoff(0.05, 1.0)


class Encoder:
    """Sends tiles to the encoder of the present pipeline, one after the other, in the order of the calls."""

    def __init__(self, projector: Projector, deadline_s: float) -> None:
        self._projector = projector
        self._deadline_s = deadline_s
        self._turn = asyncio.Lock()
        self._serving: asyncio.Future[TileEncoder] = asyncio.get_running_loop().create_future()
        self._lost = asyncio.Event()  # replaced when an encoder serves again

    def serve(self, encoder: TileEncoder | None) -> None:
        """Replaces the encoder. A tile that is computed elsewhere is finished there. None: the pipeline is lost, and
        tiles wait for the next one."""
        if self._serving.done():
            self._serving = self._serving.get_loop().create_future()
        if encoder is None:
            self._lost.set()
        else:
            self._lost = asyncio.Event()
            self._serving.set_result(encoder)

    def end(self, error: LlamaclustError) -> None:
        """Refuses tiles with this error until an encoder serves again."""
        self.serve(None)
        self._serving.set_exception(error)
        self._serving.exception()  # retrieved: there may be no tiles

    async def encode(self, tiles: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
        """Takes tiles [height, width, 3] and returns the rows [rows, levels * width] of each. Waits until a pipeline
        serves. Raises RequestError if the encoder does not take a tile, RequestFailedError if it fails several times
        with the same tile, WorkerError if requests are refused, and DeadlineError."""
        tasks = [self._task(tile) for tile in tiles]
        async with deadline("encoding an image (timeouts.request)", self._deadline_s), self._turn:
            return await self._rows(tasks)

    def _task(self, tile: NDArray[np.uint8]) -> TileTask:
        projector, (height, width, _) = self._projector, tile.shape
        return TileTask(tile, projector.rows_of(height, width), projector.levels * projector.width)

    async def _rows(self, tasks: Sequence[TileTask]) -> list[NDArray[np.float32]]:
        done: list[NDArray[np.float32]] = []
        failed = failures = 0  # the tile at which it failed last, and how often
        while len(done) < len(tasks):
            encoder = await asyncio.shield(self._serving)
            try:
                await self._while_there(self._receive(encoder, tasks, done))
            except RequestError:
                raise
            except LlamaclustError as error:
                failures = failures + 1 if len(done) == failed else 1
                failed = len(done)
                _log.warning("a tile of an image was not encoded, it is tried again: %s", error)
                if failures == MAX_STRIKES:
                    what = f"the encoder of images failed {failures} times at one tile, at last: {error}"
                    raise RequestFailedError(what) from error
                await asyncio.sleep(_BACKOFF.pause_s(failures))
        return done

    async def _receive(self, encoder: TileEncoder, tasks: Sequence[TileTask], done: list[NDArray[np.float32]]) -> None:
        async with aclosing(encoder.rows(tasks[len(done) :])) as found:
            async for rows in found:
                done.append(rows)

    async def _while_there(self, work: Coroutine[None, None, None]) -> None:
        """Raises WorkerError if the pipeline is lost first."""
        working, lost = asyncio.create_task(work), asyncio.create_task(self._lost.wait())
        try:
            await asyncio.wait((working, lost), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise WorkerError("the pipeline was lost")
            working.result()
        finally:
            working.cancel()
            lost.cancel()
            await asyncio.gather(working, lost, return_exceptions=True)
