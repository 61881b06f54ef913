"""A worker's Stage service. It finds the stage or the image encoder to which a stream belongs."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from llamaclust.core.epochs import epoch_text
from llamaclust.core.errors import ProtocolError, WorkerError
from llamaclust.kernels.backend import CacheCounts
from llamaclust.wire.control.messages import Load, StageProgress
from llamaclust.wire.control.weights import EncoderFile
from llamaclust.wire.rpc.link_probe import serve_echo
from llamaclust.wire.rpc.methods import ECHO, ENCODE, FORWARD, SAMPLE, SAMPLED_TOKENS
from llamaclust.wire.rpc.server import Handler, ServerStream
from llamaclust.worker.encoder.streams import EncoderStreams
from llamaclust.worker.encoder.tile_encoder import TileEncoder
from llamaclust.worker.stage.following import FollowingStage
from llamaclust.worker.stage.stage_runner import StageRunner, portion_of
from llamaclust.worker.stage.streams import StageStreams

_log = logging.getLogger(__name__)

_TILE_S = 30.0
"""Maximum number of seconds that a load waits for an encoder to compute its last tile and free its memory."""

LoadedStage = StageStreams | FollowingStage


class StageService:
    """The loaded stages and image encoders of a worker. While layers move between workers, a model has two stages."""

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._stages: dict[int, LoadedStage] = {}
        self._encoders: dict[int, EncoderStreams] = {}
        self._kept: list[LoadedStage] = []
        self._kept_encoders: list[EncoderStreams] = []
        self._ending = set[asyncio.Future[None]]()  # Encoders that are freed when their tile in progress is computed.
        self._ended = CacheCounts()

    @property
    def handlers(self) -> Mapping[str, Handler]:
        return {
            FORWARD: self._handler(StageStreams.forward),
            SAMPLE: self._handler(StageStreams.sample),
            SAMPLED_TOKENS: self._handler(StageStreams.sampled_tokens),
            ENCODE: self._encode,
            ECHO: serve_echo,
        }

    @property
    def holds_layers(self) -> bool:
        return bool(self._stages)

    def __contains__(self, epoch: int) -> bool:
        return epoch in self._stages

    def add(self, streams: LoadedStage, encoder: EncoderStreams | None = None) -> None:
        assert streams.epoch not in self._stages
        self._stages[streams.epoch] = streams
        if encoder is not None:
            self._encoders[streams.epoch] = encoder

    async def remove(self, epoch: int) -> None:
        """Frees an epoch's stage and image encoder. The encoder first completes its current tile (see `last_tiles`)."""
        if (encoder := self._encoders.pop(epoch, None)) is not None:
            await self.free_encoder(encoder)
        if (streams := self._stages.pop(epoch, None)) is not None:
            await self._close(streams)

    async def free_encoder(self, encoder: EncoderStreams) -> None:
        is_computing, freed = encoder.is_computing, encoder.close()
        self._ending.add(freed)
        freed.add_done_callback(self._ending.discard)
        if not is_computing:
            await asyncio.wait((freed,))

    async def last_tiles(self) -> bool:
        """Waits up to `_TILE_S` s for closed encoders to free their memory. Returns False if there were none."""
        ending = tuple(self._ending)
        if ending:
            _log.info("waiting until the previous image encoder has computed its last tile and freed its memory")
            await asyncio.wait(ending, timeout=_TILE_S)
        return bool(ending)

    async def _close(self, streams: LoadedStage) -> None:
        self._ended += replace(streams.runner.experts_cache, used_bytes=0)
        await streams.close()

    @property
    def experts_cache(self) -> CacheCounts:
        there = (*self._stages.values(), *self._kept)
        return sum((streams.runner.experts_cache for streams in there), self._ended)

    @property
    def progress(self) -> tuple[StageProgress, ...]:
        return tuple(streams.progress for streams in self._stages.values())

    @property
    def computing_s(self) -> float:
        return max((streams.computing_s for streams in self._stages.values()), default=0.0)

    def stage(self, epoch: int) -> LoadedStage:
        if (stage := self._stages.get(epoch)) is None:
            raise WorkerError(f"worker {self._worker} holds no stage for epoch {epoch_text(epoch)}")
        return stage

    def keep(self) -> None:
        """Ends all epochs and their groups' links. Keeps the stages in memory for a load of the same layers."""
        for stage in self._stages.values():
            stage.close_links()
        for encoder in self._encoders.values():
            encoder.end()
        self._kept += self._stages.values()
        self._kept_encoders += self._encoders.values()
        self._stages.clear()
        self._encoders.clear()

    async def free(self) -> None:
        self.keep()
        while self._kept_encoders:
            await self.free_encoder(self._kept_encoders.pop())
        while self._kept:
            await self._close(self._kept.pop())
        await self.last_tiles()

    @property
    def kept_bytes(self) -> Counter[str]:
        encoders = {"cpu": sum(kept.encoder.memory.total_bytes for kept in self._kept_encoders)}
        return sum((Counter(streams.runner.device_bytes) for streams in self._kept), Counter(encoders))

    @property
    def has_kept(self) -> bool:
        return bool(self._kept or self._kept_encoders)

    async def take_kept(self, order: Load, file_version: str | None) -> StageRunner | None:
        """Returns a kept stage that fits the order, or None. Frees all other kept stages."""
        runner = None
        while self._kept:
            streams = self._kept.pop()
            if runner is None and _serves(streams.runner, order, file_version):
                runner = await streams.release()
            else:
                await self._close(streams)
        return runner

    async def take_kept_encoder(self, wanted: EncoderFile | None, file_version: str | None) -> EncoderStreams | None:
        found = None
        while self._kept_encoders:
            kept = self._kept_encoders.pop()
            if found is None and wanted is not None and _encodes(kept.encoder, wanted, file_version):
                found = kept
            else:
                await self.free_encoder(kept)
        return found

    async def clear(self, model_id: str) -> list[object]:
        """Frees a model's stages, but not its encoders. Returns the stages' weights, so that callers can keep them."""
        freed = {epoch: streams for epoch, streams in self._stages.items() if streams.runner.model_id == model_id}
        weights = [streams.runner.weights for streams in (*freed.values(), *self._kept)]
        for epoch in freed:
            if (encoder := self._encoders.pop(epoch, None)) is not None:
                encoder.end()
                self._kept_encoders.append(encoder)
            await self.remove(epoch)
        return weights

    def _handler(self, serve: Callable[[StageStreams, ServerStream], Awaitable[None]]) -> Handler:
        async def handle(stream: ServerStream) -> None:
            streams = self._stages.get(stream.epoch)
            if streams is None:
                raise ProtocolError(f"worker {self._worker} holds no stage for epoch {epoch_text(stream.epoch)}")
            if isinstance(streams, FollowingStage):
                raise ProtocolError(
                    f"worker {self._worker} does not lead the group of epoch {epoch_text(stream.epoch)}"
                )
            await serve(streams, stream)

        return handle

    async def _encode(self, stream: ServerStream) -> None:
        if (encoder := self._encoders.get(stream.epoch)) is None:
            what = f"worker {self._worker} holds no image encoder for epoch {epoch_text(stream.epoch)}"
            raise ProtocolError(what)
        await encoder.serve(stream)


_BLOCK_COUNTS = ("kv_blocks", "window_blocks", "state_blocks")


def _serves(held: StageRunner, order: Load, file_version: str | None) -> bool:
    """True if `held` equals the stage that `order` would load, except that it may have more KV blocks."""
    same_layers = (held.program.start, held.program.end, held.devices) == (order.start, order.end, order.devices)
    same_portion = held.portion == portion_of(order)
    has, wanted = held.limits, order.limits
    counts = [(getattr(has, name), getattr(wanted, name)) for name in _BLOCK_COUNTS]
    enough = all(count >= least for count, least in counts)
    same_groups = all((count > 0) == (least > 0) for count, least in counts)
    if order.weights is None:
        same_bytes = file_version in (None, held.file_version)
    else:
        same_bytes = held.manifest == order.weights.manifest
    same_limits = replace(has, **{name: getattr(wanted, name) for name in _BLOCK_COUNTS}) == wanted
    same_parts = same_layers and same_portion and same_groups
    return held.model_id == order.model_id and same_parts and enough and same_limits and same_bytes


def _encodes(held: TileEncoder, wanted: EncoderFile, file_version: str | None) -> bool:
    if wanted.weights is None:
        same_bytes = file_version in (None, held.file_version)
    else:
        same_bytes = held.manifest == wanted.weights.manifest
    return held.file_id == wanted.file_id and same_bytes
