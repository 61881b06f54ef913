"""Fetches weights from other workers, several tensors at once. Resumes, checks hashes, and tries other sources."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from llamaclust.core.backoff import Backoff
from llamaclust.core.errors import DeadlineError, LlamaclustError, ProtocolError, WorkerError
from llamaclust.model.weights.cache import WeightCache, WeightPart
from llamaclust.wire.rpc.client import ClientStream, Peer, StreamBrokenError
from llamaclust.wire.rpc.deadlines import deadline
from llamaclust.wire.rpc.methods import FETCH, FETCH_STREAMS
from llamaclust.wire.weight_stream import FRAME_BYTES, WeightRange, WeightsNotFoundError, decode_frame, encode_range

_log = logging.getLogger(__name__)

_MOST_SOURCES = 4  # Maximum number of sources in use for one tensor.
_WRITE_BYTES = 8 * FRAME_BYTES
_MOST_MIXED = 2
_LOOK_S = 0.05
_BACKOFF = Backoff(0.1, 2.0)

OnBytes = Callable[[int], None]
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class FetchTimeouts:
    connect_s: float = 10.0
    frame_s: float = 30.0
    source_s: float = 30.0  # Seconds without data until a source that keeps failing is given up.


class DamagedError(LlamaclustError):
    """The received bytes are not the requested bytes."""


@dataclass(frozen=True, slots=True)
class WantedWeights:
    """Weights to fetch. `content` is their SHA-256 in hex."""

    content: str
    n_bytes: int
    name: str


@dataclass(slots=True, eq=False)
class _Item:
    wanted: WantedWeights
    there_bytes: int  # Number of fetched bytes that were reported as progress.
    lacking: set[str] = field(default_factory=set)  # Names of sources without the weights or with wrong bytes.
    mixed: int = 0  # Number of times that bytes from several sources, or from an earlier load, had a wrong hash.
    not_before_s: float = 0.0
    is_active: bool = False

    def best(self, ranked: Iterable[_Source]) -> list[_Source]:
        return list(islice((source for source in ranked if source.name not in self.lacking), _MOST_SOURCES))


@dataclass(slots=True, eq=False)
class _Source:
    name: str
    peer: Peer
    given_up: str | None = None  # Reason why the source was given up.
    failed_since_s: float | None = None
    failures: int = 0  # Number of failures since `failed_since_s`.
    lanes: list[asyncio.Task[None]] = field(default_factory=list)

    def give_up(self, error: LlamaclustError) -> None:
        if self.given_up is None:
            self.given_up = str(error)
            _log.error("no more weights from %s: %s", self.name, error)

    def works(self) -> None:
        if self.failed_since_s is not None:
            _log.info("weights from %s arrive again", self.name)
        self.failed_since_s, self.failures = None, 0

    async def rest(self, error: LlamaclustError, limit_s: float) -> None:
        now_s = asyncio.get_running_loop().time()
        if self.failed_since_s is None:
            self.failed_since_s = now_s
            _log.warning("weights from %s: %s; trying again for %g s", self.name, error, limit_s)
        pause_s = _BACKOFF.pause_s(self.failures)
        if now_s + pause_s - self.failed_since_s > limit_s:
            self.give_up(error)
            return
        await asyncio.sleep(pause_s)
        self.failures += 1


class WeightFetch:
    """Fetches weights. Each fetch needs a new object. `sources` are pairs (name, peer), the best source first."""

    def __init__(
        self,
        cache: WeightCache,
        sources: Iterable[tuple[str, Peer]],
        on_bytes: OnBytes,
        on_others_bytes: OnBytes,
        timeouts: FetchTimeouts = FetchTimeouts(),
    ) -> None:
        """`on_bytes` counts the bytes that this process fetches. `on_others_bytes` counts those of other processes."""
        self._cache = cache
        self._sources = [_Source(name, peer) for name, peer in sources]
        self._on_bytes = on_bytes
        self._on_others_bytes = on_others_bytes
        self._timeouts = timeouts
        self._items: list[_Item] = []

    def renew(self, name: str, peer: Peer) -> None:
        _log.info("weights are requested from %s at %s", name, peer.address)
        renewed, names = _Source(name, peer), [source.name for source in self._sources]
        place = names.index(name) if name in names else len(names)
        for former in self._sources[place : place + 1]:
            for lane in former.lanes:
                lane.cancel()
        for item in self._items:
            item.lacking.discard(name)
        self._sources[place : place + 1] = [renewed]

    async def run(self, wanted: Sequence[WantedWeights]) -> None:
        """Fetches weights into the cache. The caller holds `cache.in_use()`. Raises WorkerError if some are missing."""
        by_content = {weights.content: weights for weights in wanted}
        largest_first = sorted(by_content.values(), key=lambda weights: -weights.n_bytes)
        self._items = [_Item(weights, self._cache.part_bytes(weights.content)) for weights in largest_first]
        try:
            async with asyncio.TaskGroup() as lanes:
                while running := self._running(lanes):
                    await asyncio.wait(running, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        if self._items:
            raise self._not_found(self._items[0])

    def _running(self, lanes: asyncio.TaskGroup) -> list[asyncio.Task[None]]:
        """Starts tasks until each of the best sources has `FETCH_STREAMS` tasks. Returns all running tasks."""
        ranked = self._ranked()
        best = {source for item in self._items for source in item.best(ranked)}
        for source in self._sources:
            source.lanes = [lane for lane in source.lanes if not lane.done()]
            new = FETCH_STREAMS - len(source.lanes) if source in best else 0
            source.lanes += [lanes.create_task(self._lane(source)) for _ in range(new)]
        return [lane for source in self._sources for lane in source.lanes]

    def _ranked(self) -> list[_Source]:
        able = (source for source in self._sources if source.given_up is None)
        return sorted(able, key=lambda source: source.failed_since_s is not None)

    async def _lane(self, source: _Source) -> None:
        stream: ClientStream | None = None
        try:
            while (item := await self._next(source)) is not None:
                broken: LlamaclustError | None = None
                try:
                    stream = stream or await self._open(source)
                    await self._get(item, source, stream)
                except WeightsNotFoundError as error:
                    _log.debug("%s of %s: %s", item.wanted.name, source.name, error)
                    item.lacking.add(source.name)
                except (ProtocolError, DamagedError) as error:
                    source.give_up(error)
                except (StreamBrokenError, DeadlineError) as error:
                    broken = error
                finally:
                    item.is_active = False
                if broken is not None:
                    if stream is not None:
                        stream.cancel()
                    stream = None
                    await source.rest(broken, self._timeouts.source_s)
        finally:
            if stream is not None:
                stream.cancel()

    async def _next(self, source: _Source) -> _Item | None:
        """Waits for an item that no other task fetches. Returns None if `source` is not among the best for any item."""
        clock = asyncio.get_running_loop().time
        while True:
            ranked = self._ranked()
            own = [item for item in self._items if source in item.best(ranked)]
            if not own:
                return None
            for item in own:
                if not item.is_active and clock() >= item.not_before_s:
                    item.is_active = True
                    return item
            await asyncio.sleep(_LOOK_S)

    async def _open(self, source: _Source) -> ClientStream:
        stream = source.peer.open(FETCH)
        try:
            async with deadline(f"reaching {source.name} for weights", self._timeouts.connect_s):
                await source.peer.connected()
                await stream.opened()
        except BaseException:
            stream.cancel()
            raise
        return stream

    async def _get(self, item: _Item, source: _Source, stream: ClientStream) -> None:
        """Fetches the missing rest of a tensor. Raises ProtocolError or DamagedError if the source is at fault."""
        wanted = item.wanted
        if self._cache.find(wanted.content) is not None:  # Another process has fetched the weights.
            self._others_brought(item, wanted.n_bytes)
            self._items.remove(item)
            return
        part = await in_thread(WeightPart.open, self._cache, wanted.content, wanted.n_bytes)
        if part is None:
            self._others_brought(item, self._cache.part_bytes(wanted.content))
            item.not_before_s = asyncio.get_running_loop().time() + _LOOK_S
            return
        try:
            await self._receive(part, item, source, stream)
            was_resumed = part.resumed
            is_whole = await in_thread(part.finish)
        finally:
            part.close()
        if is_whole:
            self._items.remove(item)
        elif not was_resumed:
            raise DamagedError(f"{wanted.name}: its bytes do not have SHA-256 {wanted.content}")
        else:
            _log.warning("%s: the resumed file has another SHA-256; it is fetched again", wanted.name)
            item.mixed += 1
            if item.mixed > _MOST_MIXED:
                item.lacking.add(source.name)

    def _others_brought(self, item: _Item, there_bytes: int) -> None:
        if there_bytes > item.there_bytes:
            self._on_others_bytes(there_bytes - item.there_bytes)
            item.there_bytes = there_bytes

    async def _receive(self, part: WeightPart, item: _Item, source: _Source, stream: ClientStream) -> None:
        wanted = item.wanted
        left = wanted.n_bytes - part.done_bytes
        if left:
            await stream.write(encode_range(WeightRange(wanted.content, part.done_bytes, wanted.n_bytes)))
        frames: list[memoryview] = []
        try:
            while left:
                async with deadline(f"weights from {source.name}", self._timeouts.frame_s):
                    data = await stream.read()
                if data is None:
                    raise StreamBrokenError(f"{source.name} ended the stream")
                frames.append(decode_frame(data, left))
                left -= len(frames[-1])
                source.works()
                self._on_bytes(len(frames[-1]))
                item.there_bytes += len(frames[-1])
                if len(frames) * FRAME_BYTES >= _WRITE_BYTES:
                    full, frames = frames, []
                    await in_thread(part.write, full)
        except LlamaclustError:
            await in_thread(part.write, frames)  # The next attempt resumes after these bytes.
            raise
        await in_thread(part.write, frames)

    def _not_found(self, item: _Item) -> WorkerError:
        whys = [f"{source.name}: {source.given_up or 'does not have it'}" for source in self._sources]
        where = "; ".join(whys) or "no source is known"
        return WorkerError(f"weights of {item.wanted.name} ({item.wanted.n_bytes} bytes) are not available ({where})")


async def in_thread(function: Callable[..., _Value], *arguments: object) -> _Value:
    """Runs `function` on a thread. Waits for the thread even if cancelled, because the thread uses the file."""
    working = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait((working,))
        if working.exception() is None and isinstance(opened := working.result(), WeightPart):
            opened.close()
        raise
