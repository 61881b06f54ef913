"""The API's port while a cluster starts: it answers, with 503, whatever it is asked."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from llamaclust.cluster.api.server import StartingReplies


@asynccontextmanager
async def port() -> AsyncIterator[tuple[socket.socket, str]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize("body", [b"", b"x" * 3_000_000], ids=len)
async def test_every_request_gets_the_starting_error(body: bytes) -> None:
    async with port() as (listener, url), StartingReplies(listener), httpx.AsyncClient(timeout=20) as client:
        reply = await client.post(f"{url}/v1/completions", content=body)
        assert reply.status_code == 503 and int(reply.headers["retry-after"]) > 0
        assert reply.json()["error"]["code"] == "cluster_starting"


async def test_silent_clients_do_not_block_others() -> None:
    async with port() as (listener, url), StartingReplies(listener), httpx.AsyncClient(timeout=20) as client:
        address = listener.getsockname()
        silent = [await asyncio.open_connection(*address) for _ in range(8)]
        assert (await client.get(f"{url}/health")).status_code == 503
        for _, writer in silent:
            writer.close()


async def test_the_socket_stays_open_for_the_server() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"mine")
        writer.close()

    async with port() as (listener, _):
        async with StartingReplies(listener) as replies:
            replies.close()
        async with await asyncio.start_server(serve, sock=listener.dup()):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            assert await asyncio.wait_for(reader.read(), 20) == b"mine"
            writer.close()
