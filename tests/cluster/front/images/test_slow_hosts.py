"""Checks that image hosts which answer slowly or change their address delay only their own request."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from threading import BoundedSemaphore
from typing import Any

import httpx
import pytest

from llamaclust.cluster.client.http_codec import CHAT
from llamaclust.cluster.front.images import fetching
from support.chat.vision import TinyVision, image
from support.clusters.served import MODEL, ScriptedEngine, make_app, says, serving
from support.event_loop import pass_time

IMAGE = image(2, b"from the web")
HEAD = f"HTTP/1.1 200 OK\r\ncontent-length: {len(IMAGE)}\r\n\r\n".encode()
HOST = "example.com"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]
"""A function that answers on a connection, possibly until the client closes it."""


async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def head_only(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(HEAD)
    await reader.read()


async def without_an_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends headers without an end, one at a time."""
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while not reader.at_eof() and not writer.is_closing():
        writer.write(b"a: b\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


@dataclass(frozen=True, slots=True)
class Host:
    port: int
    connected: asyncio.Event  # the head of a request has arrived
    closed: asyncio.Event  # the client has closed a connection, or the answer is complete


@asynccontextmanager
async def web_host(serve: Serve) -> AsyncIterator[Host]:
    connected, closed, tasks = asyncio.Event(), asyncio.Event(), set[asyncio.Task[None]]()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        await reader.readuntil(b"\r\n\r\n")
        connected.set()
        try:
            await serve(reader, writer)
        except OSError:  # the client has closed the connection
            pass
        finally:
            writer.close()
            closed.set()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield Host(server.sockets[0].getsockname()[1], connected, closed)
        async with asyncio.timeout(60):
            await asyncio.gather(*tasks)  # every connection was closed by the client


def leads_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    """Resolves a host to the addresses, one per lookup, of which 127.0.0.1 counts as public. Returns the list of names
    looked up."""
    looked_up: list[str] = []

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        looked_up.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (addresses[len(looked_up) - 1], port))]

    monkeypatch.setattr(fetching, "getaddrinfo", look_up)
    public = fetching.is_public
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1" or public(address))
    return looked_up


def question(url: str) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"model": MODEL, "messages": [{"role": "user", "content": [part]}]}


@asynccontextmanager
async def served(port: int) -> AsyncIterator[httpx.AsyncClient]:
    app = make_app(ScriptedEngine(says("a")), vision=TinyVision(), image_hosts=(f"{HOST}:{port}",))
    async with serving(app) as api, httpx.AsyncClient(base_url=api, timeout=60.0, trust_env=False) as http:
        yield http


SLOW = pytest.mark.parametrize("serve", [silent, head_only, without_an_end])


@SLOW
async def test_others_are_answered_while_a_host_is_slow(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_MAX_S", 600.0)
    async with web_host(serve) as host, served(host.port) as http:
        leads_to(monkeypatch, "127.0.0.1")
        slow = asyncio.create_task(http.post(f"/{CHAT}", json=question(f"http://{HOST}:{host.port}/")))
        await host.connected.wait()
        messages = [{"role": "user", "content": "a"}]
        for _ in range(10):
            reply = await http.post(f"/{CHAT}", json={"model": MODEL, "messages": messages})
            assert reply.status_code == 200 and not slow.done()
        slow.cancel()


@SLOW
async def test_a_slow_host_ends_at_the_deadline(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    async with web_host(serve) as host, served(host.port) as http:
        leads_to(monkeypatch, "127.0.0.1")
        slow = asyncio.create_task(http.post(f"/{CHAT}", json=question(f"http://{HOST}:{host.port}/")))
        await host.connected.wait()
        pass_time(monkeypatch, fetching._MAX_S)
        reply = await slow
    message = reply.json()["error"]["message"]
    assert reply.status_code == 504 and "longer than 20 s" in message and "data URL" in message


async def test_a_name_server_that_does_not_answer_holds_up_no_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def look_up(*_: Any, **__: Any) -> list[Any]:
        assert answered.wait(60)
        return []

    monkeypatch.setattr(fetching, "getaddrinfo", look_up)
    try:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        waiting = [asyncio.create_task(fetching.fetch_images(["http://a.example/"], 1)) for _ in range(4)]
        await asyncio.sleep(0)
        async with asyncio.timeout(60):
            await asyncio.to_thread(threading.get_ident)
        for each in waiting:
            each.cancel()
        await asyncio.wait(waiting)
        monkeypatch.setattr(fetching, "_LOOKUP_S", 0.2)
        async with served(80) as http:
            reply = await http.post(f"/{CHAT}", json=question(f"http://{HOST}:80/"))
            assert reply.status_code == 504 and "looking up the host example.com" in reply.text, reply.text
            monkeypatch.setattr(fetching, "_LOOKUPS", BoundedSemaphore(1))
            for why in ("took longer than 0.2 s", "earlier lookups still wait for name servers"):
                reply = await http.post(f"/{CHAT}", json=question(f"http://{HOST}:80/"))
                assert reply.status_code == 504 and why in reply.text, reply.text
    finally:
        answered.set()


async def test_a_client_that_leaves_ends_the_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_MAX_S", 600.0)
    async with web_host(silent) as host, served(host.port) as http:
        leads_to(monkeypatch, "127.0.0.1")
        slow = asyncio.create_task(http.post(f"/{CHAT}", json=question(f"http://{HOST}:{host.port}/")))
        await host.connected.wait()
        slow.cancel()
        async with asyncio.timeout(60):
            await host.closed.wait()


@pytest.mark.parametrize("second", ["10.0.0.1", "169.254.169.254", "::1"])
async def test_a_host_whose_second_address_is_private(second: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that a name is looked up once per request and that the image comes from the checked address."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + IMAGE)

    async with web_host(serve) as host, served(host.port) as http:
        looked_up = leads_to(monkeypatch, "127.0.0.1", second, second)
        reply = await http.post(f"/{CHAT}", json=question(f"http://{HOST}:{host.port}/"))
        assert reply.status_code == 200 and looked_up == [HOST]
        refused = await http.post(f"/{CHAT}", json=question(f"http://{HOST}:{host.port}/"))
    assert refused.status_code == 400 and "not public" in refused.text and looked_up == [HOST, HOST]
