"""Encodes image tiles on the running pipeline. If the pipeline is lost, the next pipeline encodes its tile again."""

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
"""Maximum seconds to wait for the current image tile before its pipeline is closed for a move or another model."""


class _AttemptError(Exception):
    """An image tile could not be encoded. `is_strike` is true if the tile itself may have caused the failure."""

    def __init__(self, cause: LlamaclustError, *, is_strike: bool) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.is_strike = is_strike


@dataclass(frozen=True, slots=True, eq=False)
class _Serving:
    encoder: PipelineEncoder
    # Done when the pipeline has ended. The result is its failure, or None if the model was unloaded.
    lost: asyncio.Future[LlamaclustError | None]


class Encoder:
    """Encodes one image tile at a time. Clients with waiting tiles take turns after each tile."""

    def __init__(
        self, projector: Projector, deadline_s: float, announced: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """Creates an encoder that holds the context `announced()` open while an image waits or is encoded."""
        self._projector = projector
        self._announced = announced
        self._deadline_s = deadline_s
        self._images = Turns(sys.maxsize, 1)
        self._tiles = Turns(1)
        self._running: asyncio.Task[NDArray[np.float32]] | None = None
        self._loop = asyncio.get_running_loop()
        self._present: _Serving | None = None
        # Current encoder. The future is pending while no tile may begin.
        self._serving: asyncio.Future[_Serving] = self._loop.create_future()

    def serve(self, encoder: PipelineEncoder) -> None:
        """Encodes tiles with `encoder` from now on. A tile that is being encoded stays with the old encoder."""
        self.pause()
        self._present = _Serving(encoder, self._loop.create_future())
        self._serving.set_result(self._present)

    def lose(self, error: LlamaclustError | None) -> None:
        """Abandons the tile that is being encoded. The next encoder encodes it. `error` is the pipeline's failure."""
        self.pause()
        if self._present is not None:
            self._present.lost.set_result(error)
            self._present = None

    def end(self, error: LlamaclustError) -> None:
        """Makes all tiles fail with `error` until `serve` is called."""
        self.lose(error)
        self._serving.set_exception(error)
        self._serving.exception()  # Reading the exception avoids asyncio's warning if no tile waits.

    def pause(self) -> None:
        """Starts no further tile until `serve` is called."""
        if self._serving.done():
            self._serving = self._loop.create_future()

    async def wait_idle(self) -> None:
        """Waits for the tile that is being encoded, up to 120 s."""
        if self._running is not None and not (await asyncio.wait((self._running,), timeout=_LAST_TILE_S))[0]:
            _log.warning("an image tile has taken longer than %g s; it will be encoded again", _LAST_TILE_S)

    @asynccontextmanager
    async def turn(self, owner: str) -> AsyncIterator[None]:
        """Waits for the client's turn to encode an image, and holds the turn while the context is open. Raises
        DeadlineError if waiting and encoding together exceed the time limit."""
        with self._announced():
            async with deadline("encoding an image (timeouts.request)", self._deadline_s), self._images.turn(owner):
                yield

    async def encode(self, tiles: Sequence[NDArray[np.uint8]], owners: Owners) -> list[NDArray[np.float32]]:
        """Encodes image tiles [height, width, 3] to embeddings [rows, levels * width]. The caller holds a `turn`.
        Raises RequestError for a refused tile, RequestFailedError after many failures, and WorkerError after `end`."""
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
                    what = f"the image encoder failed {strikes} times on the same tile, the last time with: {failed}"
                    raise RequestFailedError(what) from failed.cause
                _log.warning("an image tile could not be encoded and will be tried again: %s", failed)
            await asyncio.sleep(_BACKOFF.pause_s(attempts))
            attempts += 1

    async def _attempt(self, task: TileTask, serving: _Serving) -> NDArray[np.float32]:
        self._running = working = asyncio.create_task(serving.encoder.rows(task))
        try:
            await asyncio.wait((working, serving.lost), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                loss = serving.lost.result()
                raise WorkerError("the model was unloaded" if loss is None else f"the pipeline was lost: {loss}")
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
        if isinstance(error, EncoderUnreachableError):
            return False
        if serving.lost.done():
            loss = serving.lost.result()
            return loss is not None and loss.worker is not None and loss.worker == serving.encoder.worker
        return serving is self._present
