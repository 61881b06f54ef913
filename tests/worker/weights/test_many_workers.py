"""Tests of weights in large clusters: few sources are asked at once, and many streams share a source's memory."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamaclust.core.errors import ProtocolError, WorkerError
from llamaclust.model.weights.cache import WeightCache
from llamaclust.wire.rpc.methods import FETCH, FETCH_STREAMS, METHODS
from llamaclust.wire.weight_stream import FRAME_BYTES, WeightRange, encode_range
from llamaclust.worker.weights.fetch import WantedWeights, WeightFetch
from llamaclust.worker.weights.giver import WeightGiver
from support.clusters.served import until

ROOM = 1 << 30


async def test_sources_have_lanes_only_while_they_are_among_the_best_four(tmp_path: Path) -> None:
    asked: list[str] = []
    lost = asyncio.Event()

    def peer(name: str) -> Any:
        async def connected() -> None:
            asked.append(name)
            await lost.wait()
            raise ProtocolError(f"{name} is lost")

        return SimpleNamespace(open=lambda method: SimpleNamespace(cancel=lambda: None), connected=connected)

    names, cache = [f"source {number}" for number in range(12)], WeightCache(tmp_path / "cache", ROOM)
    what = [WantedWeights(f"{number:064x}", 1, f"tensor {number}") for number in range(30)]
    sources = [(name, peer(name)) for name in names]
    fetching = WeightFetch(cache, sources, lambda n_bytes: None, lambda n_bytes: None)
    async with asyncio.timeout(60):
        with cache.in_use():
            running = asyncio.create_task(fetching.run(what))
            await until(lambda: len(asked) == 4 * FETCH_STREAMS)
            assert {*asked} == {*names[:4]} and [len(source.lanes) for source in fetching._sources[4:]] == [0] * 8
            lost.set()
            with pytest.raises(WorkerError, match=r"not available .source 0: source 0 is lost; .*source 11 is lost"):
                await running
    assert {*asked} == {*names}


async def test_pieces_are_smaller_while_many_streams_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    released = asyncio.Event()

    def read(giver: WeightGiver, content: str, start: int, end: int) -> bytearray:
        sizes.append(end - start)
        return bytearray(1)

    async def nothing() -> None:
        """Accepts the stream."""

    async def write(frame: bytes) -> None:
        await released.wait()

    def stream() -> Any:
        requests = [encode_range(WeightRange("ab" * 32, 0, 8 * FRAME_BYTES))]

        async def read_message() -> bytes | None:
            return requests.pop() if requests else None

        return SimpleNamespace(accept=nothing, read=read_message, write=write)

    monkeypatch.setattr(WeightGiver, "_read", read)
    giver, most = WeightGiver(None), METHODS[FETCH].streams
    async with asyncio.timeout(60), asyncio.TaskGroup() as serving:
        for _ in range(most):
            serving.create_task(giver._serve(stream()))
        await until(lambda: len(sizes) == most)
        assert (max(sizes), min(sizes)) == (8 * FRAME_BYTES, (256 << 20) // most)
        released.set()
    assert not giver._giving
