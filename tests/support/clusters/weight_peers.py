"""Servers of a model's weights, correct and faulty ones, and a client that fetches weights from them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from llamaclust.model.loader import Model
from llamaclust.model.weights.cache import WeightCache
from llamaclust.model.weights.manifest import Manifest, read_manifest
from llamaclust.wire.control.weights import FindWeights
from llamaclust.wire.rpc.client import Peer
from llamaclust.wire.rpc.methods import FETCH
from llamaclust.wire.rpc.server import Server, ServerStream
from llamaclust.wire.security.credentials import Insecure
from llamaclust.wire.weight_stream import WeightRange, decode_range
from llamaclust.worker.weights.fetch import FetchTimeouts, WantedWeights, WeightFetch
from llamaclust.worker.weights.weights import Weights

ROOM = 1 << 30
IMPATIENT = FetchTimeouts(connect_s=1.0, frame_s=1.0, source_s=1.0)
INSECURE = Insecure()

Answer = Callable[[ServerStream, WeightRange], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Holder:
    """A worker's weights with a server that records requested ranges."""

    weights: Weights
    server: Server
    asked: list[WeightRange]

    @property
    def peer(self) -> Peer:
        return Peer(self.server.address, INSECURE)


@asynccontextmanager
async def holder(model: Path, folder: Path, answer: Answer | None = None) -> AsyncIterator[Holder]:
    """Serves the weights of a model file; `answer`, if given, answers requests instead."""
    weights = Weights(WeightCache(folder, ROOM))
    weights.locate(FindWeights(str(model), Model.open(model).model_id, describe=True))
    asked: list[WeightRange] = []

    async def serve(stream: ServerStream) -> None:
        await stream.accept()
        while (data := await stream.read()) is not None:
            asked.append(decode_range(data))
            await (weights.giver._give if answer is None else answer)(stream, asked[-1])

    server = await Server.start("127.0.0.1:0", INSECURE, {FETCH: serve})
    try:
        yield Holder(weights, server, asked)
    finally:
        await server.stop(0.0)


def manifest_of(source: Holder, model: Path) -> Manifest:
    located = source.weights.locate(FindWeights(str(model), Model.open(model).model_id, describe=True))
    assert located.manifest is not None and source.weights.cache is not None
    return read_manifest(source.weights.cache.place(located.manifest))


def wanted(manifest: Manifest, part: str = "") -> list[WantedWeights]:
    """Returns the tensors whose names contain `part`."""
    return [
        WantedWeights(record.content, record.n_bytes, record.name) for record in manifest.tensors if part in record.name
    ]


async def fetch(
    cache: WeightCache,
    holders: Iterable[Holder],
    what: Sequence[WantedWeights],
    on_bytes: Callable[[int], None] = lambda n_bytes: None,
) -> int:
    """Fetches weights and returns the number of received payload bytes."""
    came = 0

    def count(n_bytes: int) -> None:
        nonlocal came
        came += n_bytes
        on_bytes(n_bytes)

    sources = [(f"holder {index}", source.peer) for index, source in enumerate(holders)]
    with cache.in_use():
        try:
            await WeightFetch(cache, sources, count, lambda n_bytes: None, IMPATIENT).run(what)
        finally:
            for _, peer in sources:
                await peer.close()
    return came
