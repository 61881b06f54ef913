"""Tests of servers that stop during their start or with open streams. Nothing is logged."""

from __future__ import annotations

import asyncio
import gc
import logging
from contextlib import suppress
from pathlib import Path

import pytest

from llamaclust.wire.rpc.client import Peer
from llamaclust.wire.rpc.methods import JOIN
from llamaclust.wire.rpc.server import Server, ServerStream
from llamaclust.wire.security.token import ClusterToken


@pytest.mark.parametrize("use", ["read", "write"])
def test_a_stream_that_is_used_after_its_server_has_stopped_ends_quietly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, use: str
) -> None:
    token = ClusterToken.create()
    ended: list[str] = []
    tasks: list[asyncio.Task[None] | None] = []

    async def run() -> None:
        stopped, came = asyncio.Event(), asyncio.Event()

        async def handler(stream: ServerStream) -> None:
            await stream.accept()
            tasks.append(asyncio.current_task())
            came.set()
            with suppress(asyncio.CancelledError):
                await stopped.wait()
            await stopped.wait()
            try:
                await (stream.read() if use == "read" else stream.write(b"late"))
            except Exception as error:
                ended.append(type(error).__name__)
                raise

        server = await Server.start(f"unix:{tmp_path}/s.sock", token, {JOIN: handler})
        peer = Peer(server.address, token)
        await peer.open(JOIN).opened()
        await came.wait()
        await server.stop(0.0)
        stopped.set()
        await peer.close()
        await asyncio.wait([task for task in tasks if task], timeout=10.0)

    with caplog.at_level(logging.INFO):
        asyncio.run(run())
    assert ended == ["StreamBrokenError"]
    assert not caplog.records


@pytest.mark.parametrize("steps", range(6))
def test_a_start_that_is_cancelled_ends_quietly(tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: int) -> None:
    async def run() -> None:
        token = ClusterToken.create()
        starting = asyncio.create_task(Server.start(f"unix:{tmp_path}/s.sock", token, {}))
        for _ in range(steps):
            await asyncio.sleep(0)
        starting.cancel()
        with suppress(asyncio.CancelledError):
            await (await starting).stop(0.0)
        del starting
        gc.collect()

    asyncio.run(run())
    assert not caplog.records


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("does", ["reads", "waits", "cleans up"])
def test_an_event_loop_that_ends_with_its_server_says_nothing_of_open_streams(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, does: str, count: int
) -> None:
    token, ended = ClusterToken.create(), list[str]()

    async def handler(stream: ServerStream) -> None:
        await stream.accept()
        try:
            await (stream.read() if does == "reads" else asyncio.Event().wait())
        finally:
            if does == "cleans up":
                await asyncio.sleep(0.01)
            ended.append(does)

    async def run() -> None:
        server = await Server.start("127.0.0.1:0", token, {JOIN: handler})
        peers = [Peer(server.address, token) for _ in range(count)]
        await asyncio.gather(*(peer.open(JOIN).opened() for peer in peers))
        await server.stop(0.0)  # The peers are still connected, because closing them would take time.

    asyncio.run(run())
    assert ended == [does] * count
    assert not [record for record in caplog.records if record.name.startswith("grpc")]
    assert "Traceback" not in capfd.readouterr().err
