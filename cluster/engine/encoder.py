"""Encodes image tiles on the pipeline that serves. After a loss, another pipeline encodes them with equal bits."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llamaclust.cluster.engine.pipeline import EncoderUnreachableError, PipelineEncoder, TileTask
from llamaclust.cluster.scheduler.strikes import MAX_STRIKES
from llamaclust.core.backoff import Backoff
from llamaclust.core.errors import LlamaclustError, RequestError, RequestFailedError, WorkerError
from llamaclust.core.sharing.computations import Owners
from llamaclust.core.sharing.turns import Turns
from llamaclust.model.projectors.projector import Projector
from llamaclust.wire.rpc.deadlines import deadline

_log = logging.getLogger(__name__)

_BACKOFF = Backoff(0.05, 1.0)
_LAST_TILE_S = 120.0
"""The deadline in seconds for the tile in progress when its model gives way. A slower tile is computed again later."""


class _AttemptError(Exception):
    """A tile was not encoded. `is_strike` means that the tile may be the cause, because it ran at the failed worker."""

    def __init__(self, cause: LlamaclustError, *, is_strike: bool) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.is_strike = is_strike


@dataclass(frozen=True, slots=True, eq=False)
class _Serving:
    encoder: PipelineEncoder
    lost: asyncio.Future[LlamaclustError | None]  # the failure of its pipeline; None: it was given up


class Encoder:
    """Sends one tile at a time to the present pipeline's encoder. Owners take turns, tile by tile. Each owner encodes
    one image at a time, in the order of the calls."""

    def __init__(
        self, projector: Projector, deadline_s: float, announced: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Enters `announced()` while an image waits or is encoded."""
        self._projector = projector
        self._announced = announced
        self._deadline_s = deadline_s
        self._images = Turns(sys.maxsize, 1)
        self._tiles = Turns(1)
        self._running: asyncio.Task[NDArray[np.float32]] | None = None
        self._loop = asyncio.get_running_loop()
        self._present: _Serving | None = None
        self._serving: asyncio.Future[_Serving] = self._loop.create_future()  # pending while no tile may begin

    def serve(self, encoder: PipelineEncoder) -> None:
        """Replaces the encoder. A tile in progress is finished by the encoder that has it."""
        self.pause()
        self._present = _Serving(encoder, self._loop.create_future())
        self._serving.set_result(self._present)

    def lose(self, error: LlamaclustError | None) -> None:
        """Ends the tile in progress. Tiles wait for the next encoder. `error` is the pipeline's failure, if any."""
        self.pause()
        if self._present is not None:
            self._present.lost.set_result(error)
            self._present = None

    def end(self, error: LlamaclustError) -> None:
        """Refuses tiles with this error until an encoder serves again."""
        self.lose(error)
        self._serving.set_exception(error)
        self._serving.exception()  # retrieved: there may be no tiles

    def pause(self) -> None:
        """Starts no further tile until an encoder serves again."""
        if self._serving.done():
            self._serving = self._loop.create_future()

    async def wait_idle(self) -> None:
        """Waits for the tile in progress, but not beyond its deadline: a hung worker must not delay other models."""
        if self._running is not None and not (await asyncio.wait((self._running,), timeout=_LAST_TILE_S))[0]:
            _log.warning("an image tile takes longer than %g s: other models no longer wait for it", _LAST_TILE_S)

    @asynccontextmanager
    async def turn(self, owner: str) -> AsyncIterator[None]:
        """Enters an owner's turn for one image. Raises DeadlineError if waiting and encoding take longer than a request
        may take."""
        with self._announced():
            async with deadline("encoding an image (timeouts.request)", self._deadline_s), self._images.turn(owner):
                yield

    async def encode(self, tiles: Sequence[NDArray[np.uint8]], owners: Owners) -> list[NDArray[np.float32]]:
        """Takes tiles [height, width, 3], and returns each tile's rows [rows, levels * width]. The caller must be in
        `turn`. Each tile takes its turn for the first owner. Waits until a pipeline serves. Raises RequestError if the
        encoder refuses a tile, RequestFailedError if the worker fails repeatedly on the same tile, and WorkerError if
        requests are refused."""
        tasks = [self._task(tile) for tile in tiles]
        return [await self._encoded(task, owners) for task in tasks]

    def _task(self, tile: NDArray[np.uint8]) -> TileTask:
        projector, (height, width, _) = self._projector, tile.shape
        return TileTask(tile, projector.rows_of(height, width), projector.levels * projector.width)

    async def _encoded(self, task: TileTask, owners: Owners) -> NDArray[np.float32]:
        attempts = strikes = 0
        while True:
            try:
                async with self._tiles.turn(next(iter(owners), "")):
                    return await self._attempt(task, await asyncio.shield(self._serving))
            except _AttemptError as failed:
                strikes += failed.is_strike
                if strikes == MAX_STRIKES:
                    what = f"the image encoder failed {strikes} times on the same tile, most recently: {failed}"
                    raise RequestFailedError(what) from failed.cause
                _log.warning("an image tile was not encoded and will be tried again: %s", failed)
            await asyncio.sleep(_BACKOFF.pause_s(attempts))
            attempts += 1

    async def _attempt(self, task: TileTask, serving: _Serving) -> NDArray[np.float32]:
        self._running = working = asyncio.create_task(serving.encoder.rows(task))
        try:
            await asyncio.wait((working, serving.lost), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                loss = serving.lost.result()
                raise WorkerError("the pipeline was given up" if loss is None else f"the pipeline was lost: {loss}")
            return working.result()
        except RequestError:
            raise
        except LlamaclustError as error:
            raise _AttemptError(error, is_strike=self._is_strike(serving, error)) from error
        finally:
            self._running = None
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    def _is_strike(self, serving: _Serving, error: LlamaclustError) -> bool:
        """True if the encoder or its worker failed. False if the pipeline was given up, was replaced, or was lost
        because of another worker."""
        if isinstance(error, EncoderUnreachableError):
            return False
        if serving.lost.done():
            loss = serving.lost.result()
            return loss is not None and loss.worker is not None and loss.worker == serving.encoder.worker
        return serving is self._present
