"""Checks that the API answers all requests with 503 while a cluster starts."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from llamaclust.cluster.front.http.connections import ApiPort
from llamaclust.cluster.front.http.page import assets
from llamaclust.cluster.front.http.server import StartingReplies
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.state.events import AwaitingWorkers, Event, Notice, Waiting, WorkerJoined


@asynccontextmanager
async def port() -> AsyncIterator[tuple[socket.socket, str]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


def replies_on(listener: socket.socket, **settings: Any) -> StartingReplies:
    return StartingReplies(ApiPort(listener), ApiSettings(**settings), lambda event: None)


@pytest.mark.parametrize(
    ("target", "status"),
    [
        *((path, 200) for path in ("/live", "/live?x=1", "/live/", "/llm/live", "/llm/live/", "http://a:1/live")),
        *((path, 503) for path in ("/health", "/llm/health", "/other/live", "*")),
    ],
)
async def test_a_coordinator_that_waits_is_live(target: str, status: int) -> None:
    async with (
        port() as (listener, url),
        StartingReplies(ApiPort(listener), ApiSettings(prefix="/llm"), lambda event: None, is_live=True),
        asyncio.timeout(60),
    ):
        host, _, number = url.removeprefix("http://").rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(number))
        writer.write(f"GET {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        assert f" {status} " in (await reader.readline()).decode()
        writer.close()


@pytest.mark.parametrize("body", [b"", b"x" * 3_000_000], ids=len)
async def test_every_request_gets_the_starting_error(body: bytes) -> None:
    async with port() as (listener, url), replies_on(listener), httpx.AsyncClient(timeout=20) as client:
        reply = await client.post(f"{url}/v1/completions", content=body)
        assert reply.status_code == 503 and int(reply.headers["retry-after"]) > 0
        assert reply.json()["error"]["code"] == "cluster_starting"


async def test_the_starting_error_has_the_form_of_its_path() -> None:
    async with (
        port() as (listener, url),
        replies_on(listener, prefix="/llm"),
        httpx.AsyncClient(base_url=url, timeout=20) as client,
    ):
        paths = (
            "/v1/chat/completions",
            "/v1/messages",
            "/llm/v1/messages",
            "/api/chat",
            "/llm/api/chat",
            "/completion",
        )
        openai, *messages, chat, prefixed, completion = [(await client.post(path)).json() for path in paths]
    assert (openai["error"]["type"], completion["error"]["type"]) == ("server_error", "unavailable_error")
    for message in messages:
        assert (message["type"], message["error"]["type"]) == ("error", "overloaded_error")
    assert chat == prefixed == {"error": "the cluster is starting: try again later"}


async def test_the_starting_error_names_what_is_awaited_for_those_with_a_key() -> None:
    passed_on: list[Event] = []
    key = {"Authorization": "Bearer first-key"}
    async with (
        port() as (listener, url),
        httpx.AsyncClient(timeout=20) as client,
        StartingReplies(ApiPort(listener), ApiSettings(api_keys=("first-key",)), passed_on.append) as replies,
    ):

        async def told(**headers: str) -> str:
            error = (await client.get(f"{url}/cluster", headers=headers)).json()["error"]
            message: str = error["message"].removeprefix("the cluster is starting: try again later")
            assert message == (f"; it waits for {error['awaited']}" if error["awaited"] else "")
            return message

        assert await told(**key) == ""
        replies.report(AwaitingWorkers(("on each machine: ...",), ("worker a", "worker b")))
        assert await told(**key) == "; it waits for worker a, worker b"
        assert await told() == await told(Authorization="Bearer wrong") == ""
        replies.report(WorkerJoined("a", "host", ("worker b",)))
        replies.report(Notice("something else"))
        assert await told(**key) == "; it waits for worker b"
        replies.report(Waiting("worker b, since 12 MiB are missing"))
        assert await told(**key) == "; it waits for worker b, since 12 MiB are missing"
        assert len(passed_on) == 4


async def test_the_page_is_there_and_says_that_the_cluster_starts() -> None:
    html = {"Accept": "text/html"}
    async with (
        port() as (listener, url),
        replies_on(listener, prefix="/llm", api_keys=("first-key",)),
        httpx.AsyncClient(timeout=20) as client,
    ):
        for path, asset in assets().items():
            for prefix in ("", "/llm"):
                reply = await client.get(f"{url}{prefix}{path}?a=1", headers=html)
                assert (reply.status_code, reply.content) == (200, asset.data)
                assert "default-src 'none'" in reply.headers["content-security-policy"]
        again = await client.get(url, headers={**html, "If-None-Match": assets()["/"].etag})
        assert (again.status_code, again.content) == (304, b"")
        for other in (client.get(url), client.post(url, headers=html), client.get(f"{url}/browser/", headers=html)):
            assert (await other).json()["error"]["code"] == "cluster_starting"


async def test_silent_clients_do_not_block_others() -> None:
    async with port() as (listener, url), replies_on(listener), httpx.AsyncClient(timeout=20) as client:
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
        async with replies_on(listener) as replies:
            replies.close()
        async with await asyncio.start_server(serve, sock=listener.dup()):
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            assert await asyncio.wait_for(reader.read(), 20) == b"mine"
            writer.close()


@pytest.mark.parametrize("turns", range(6))
async def test_a_request_that_comes_as_the_replies_end_is_answered_by_them_or_the_next_server(turns: int) -> None:
    """Closes the replies `turns` turns of the event loop after the client has connected."""
    loop = asyncio.get_running_loop()
    async with port() as (listener, _), replies_on(listener) as replies:
        with socket.create_connection(listener.getsockname()) as client:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            client.setblocking(False)
            for _ in range(turns):
                await asyncio.sleep(0)
            replies.close()
            async with replies_on(listener), asyncio.timeout(60):
                assert (await loop.sock_recv(client, 100)).startswith(b"HTTP/1.1 503")
