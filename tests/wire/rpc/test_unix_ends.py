"""Tests of the end of Unix socket streams: earlier messages arrive first, and the reason is known."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from random import Random

import pytest

from llamaclust.core.errors import WorkerError
from llamaclust.wire.rpc.client import Peer, StreamBrokenError, UnreachableError
from llamaclust.wire.rpc.methods import SAMPLE
from llamaclust.wire.rpc.server import Server, ServerStream
from llamaclust.wire.rpc.unix_connection import FrameKind, _LargeFrame
from llamaclust.wire.security.token import ClusterToken
from support.clusters.journals import until
from support.seed import SEED

TOKEN = ClusterToken("t" * 40)


@pytest.fixture
def address(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/s.sock"


async def test_why_a_stream_ended_is_known_also_where_a_write_fails_first(address: str) -> None:
    begun = asyncio.Event()

    async def refusing(stream: ServerStream) -> None:
        begun.set()
        await stream.accept()
        await stream.read()
        await stream.write(b"last")
        raise WorkerError("worker c has gone", worker="c")

    server = await Server.start(address, TOKEN, {SAMPLE: refusing})
    ended = threading.Event()

    async def elsewhere() -> None:  # The caller's event loop is busy meanwhile.
        peer = Peer(address, TOKEN)
        stream = peer.open(SAMPLE)
        await stream.opened()
        await stream.write(b"first")
        ended.wait(10.0)
        assert not stream.has_message
        with pytest.raises(StreamBrokenError, match="worker c has gone") as broken:
            for _ in range(100):
                await stream.write(b"second")
                await asyncio.sleep(0)
        assert broken.value.worker == "c" and not isinstance(broken.value, UnreachableError)
        assert await stream.read() == b"last"
        await peer.close()

    calling = asyncio.create_task(asyncio.to_thread(asyncio.run, elsewhere()))
    async with asyncio.timeout(60):
        await begun.wait()
        await until(lambda: not server._server.contexts)
        ended.set()
        await calling
    await server.stop(0.0)


async def test_control_frames_follow_all_large_messages_and_come_once(address: str) -> None:
    received: list[bytes] = []

    async def taking(stream: ServerStream) -> None:
        await stream.accept()
        while (data := await stream.read()) is not None:
            received.append(data)

    server = await Server.start(address, TOKEN, {SAMPLE: taking})
    peer = Peer(address, TOKEN)
    large = [bytes([each]) * (1 << 20) for each in range(3)]
    async with asyncio.timeout(60):
        stream = peer.open(SAMPLE)
        await stream.opened()
        sending = asyncio.create_task(stream._call.write(*large))
        await asyncio.sleep(0)
        await stream.done_writing()
        await sending
        assert await stream.read() is None
    assert received == large
    await peer.close()
    await server.stop(0.0)


def test_a_frame_takes_memory_as_it_comes() -> None:
    large = _LargeFrame(FrameKind.MESSAGE, 1 << 28, memoryview(b"abc"))
    assert len(large.free) < 1 << 20 and len(large.content) < 1 << 20
    content, place = Random(SEED).randbytes(3_000_000), 10
    large = _LargeFrame(FrameKind.MESSAGE, len(content), memoryview(content)[:place])
    while place < len(content):
        free = large.free
        count = min(len(free), 70_001)
        free[:count] = content[place : place + count]
        place += count
        free.release()
        assert large.add(count) == (place == len(content))
    assert large.content == content
