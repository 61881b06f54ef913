"""Checks that idle and slow connections are closed in time, do not block others and are not logged."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import resource
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from llamaclust.cluster.front.http.connections import ApiPort
from llamaclust.cluster.front.http.server import server_config
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.core.process_settings import allow_many_files
from support.clusters.served import ScriptedEngine, make_app, says, serving, until
from support.event_loop import pass_time

HEALTH = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
GENERATION = {"prompt": "Hello", "max_tokens": 3}
FOR_LONG = 60.0
NGINX_S = 60.0
"""The default time for which nginx keeps an idle connection to a server."""
with socket.socket() as closed:
    PORT = ApiPort(closed)


@dataclass
class Peer:
    """A client's connection, to which a test writes raw bytes."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    received: bytearray = field(default_factory=bytearray)

    @property
    def is_closed(self) -> bool:
        return self.reader.at_eof() or self.reader.exception() is not None

    async def head(self) -> bytes:
        """Reads the head of a reply."""
        return await self.reader.readuntil(b"\r\n\r\n")

    async def reply(self) -> None:
        """Reads a whole reply."""
        head = await self.head()
        length = re.search(rb"Content-Length: (\d+)", head)
        await (self.reader.readuntil(b"\r\n0\r\n\r\n") if length is None else self.reader.readexactly(int(length[1])))

    async def drip(self, data: bytes, every_s: float) -> None:
        with suppress(ConnectionError):
            for byte in data:
                self.writer.write(bytes([byte]))
                await self.writer.drain()
                await asyncio.sleep(every_s)


@dataclass
class Server:
    """A served app and connections to it, which are closed after the test."""

    address: str
    engine: ScriptedEngine
    peers: list[Peer] = field(default_factory=list)

    async def connect(self, count: int = 1) -> list[Peer]:
        host, _, port = self.address.removeprefix("http://").rpartition(":")
        made = [Peer(*await asyncio.open_connection(host, int(port))) for _ in range(count)]
        self.peers += made
        return made

    async def answers(self) -> bool:
        async with httpx.AsyncClient(base_url=self.address, trust_env=False, timeout=5) as http:
            reply = await http.post("/v1/completions", json=GENERATION)
        return reply.status_code == 200 and reply.json()["choices"][0]["text"] == "Hi"


@asynccontextmanager
async def served(max_requests: int = 512, **deadlines: Any) -> AsyncIterator[Server]:
    settings = ApiSettings(max_requests=max_requests, **deadlines)
    engine = ScriptedEngine(says("Hi"))
    async with serving(make_app(engine), settings) as address:
        server = Server(address, engine)
        try:
            yield server
        finally:
            for peer in server.peers:
                peer.writer.close()


@pytest.fixture(autouse=True)
def _nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert [record.message for record in caplog.get_records("call") if record.levelno >= logging.WARNING] == []


async def test_silent_connections_are_closed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async with served(head_s=FOR_LONG) as server:
        silent = await server.connect(20)
        drips = [asyncio.create_task(peer.drip(HEALTH[:-1], 0.05)) for peer in await server.connect(20)]
        assert await server.answers()
        assert not any(peer.is_closed for peer in silent)
        for _ in range(2):  # More bytes come between the halves.
            pass_time(monkeypatch, FOR_LONG / 2)
            await asyncio.sleep(0.2)
        await until(lambda: all(peer.is_closed for peer in server.peers))
        await asyncio.gather(*drips)
        assert await server.answers()


async def test_header_names_of_replies_have_capitals() -> None:
    """Checks header names for clients that compare them case-sensitively."""
    async with served() as server:
        for request, status in (
            (HEALTH, 200),
            (HEALTH.replace(b"127.0.0.1", b"evil.example"), 403),
            (b"x\r\n\r\n", 400),
        ):
            (peer,) = await server.connect()
            peer.writer.write(request)
            line, *fields = (await peer.head()).split(b"\r\n")
            assert b" %d " % status in line
            names = [field.partition(b":")[0] for field in fields if field]
            assert b"Content-Type" in names and names == [name.title() for name in names]


@pytest.mark.parametrize(("host", "status"), [(b"127.0.0.1", 200), (b"evil.example", 403)])
async def test_targets_with_a_host_as_for_a_proxy(host: bytes, status: int) -> None:
    async with served() as server:
        (peer,) = await server.connect()
        peer.writer.write(HEALTH.replace(b"/health", b"http://" + host + b"/health"))
        assert b" %d " % status in await peer.head()


async def test_a_kept_connection_that_sends_no_further_head_is_closed_in_time() -> None:
    async with served(head_s=0.3) as server:
        (peer,) = await server.connect()
        for _ in range(3):
            peer.writer.write(HEALTH)
            assert (await peer.head()).startswith(b"HTTP/1.1 200")
            assert await peer.reader.readuntil(b"}") == b'{"status":"ok"}'
        drip = asyncio.create_task(peer.drip(HEALTH, 0.05))
        await until(lambda: peer.is_closed)
        await drip


def test_idle_connections_are_kept_for_longer_than_clients_and_proxies_keep_them() -> None:
    """Checks that clients close first: nginx answers 502 if a server closes an idle connection during a request."""
    settings = ApiSettings()
    server_s = server_config(Starlette(), settings, PORT).timeout_keep_alive
    client_s = httpx.Limits().keepalive_expiry
    assert client_s is not None and client_s < NGINX_S < settings.idle_s < server_s


def _post(path: bytes, body: bytes) -> bytes:
    return b"POST %b HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n%b" % (path, len(body), body)


REQUESTS = {
    "stream": _post(b"/v1/completions", b'{"prompt": "Hello", "max_tokens": 3, "stream": true}'),
    "whole": _post(b"/v1/completions", b'{"prompt": "Hello", "max_tokens": 3}'),
    "refused": _post(b"/tokenize", b"{"),
    "unknown path": HEALTH.replace(b"/health", b"/nothing"),
}


@pytest.mark.parametrize("request_before", REQUESTS.values(), ids=REQUESTS.keys())
async def test_the_deadline_of_a_head_runs_from_its_first_byte(request_before: bytes) -> None:
    """Checks that connections without a byte of a next request stay open and that a dripping one is closed."""
    async with served(head_s=0.3, idle_s=FOR_LONG) as server:
        kept, begun, dripping = peers = await server.connect(3)
        for peer in peers:
            peer.writer.write(request_before)
        for peer in peers:
            await peer.reply()
        begun.writer.write(HEALTH[:1])
        drip = asyncio.create_task(dripping.drip(HEALTH * 9, 0.05))
        await until(lambda: begun.is_closed and dripping.is_closed)
        await drip
        assert not kept.is_closed
        kept.writer.write(HEALTH)
        assert (await kept.head()).startswith(b"HTTP/1.1 200")


async def test_a_head_that_began_behind_another_request_has_its_deadline() -> None:
    async with served(head_s=0.3, idle_s=FOR_LONG) as server:
        (peer,) = await server.connect()
        peer.writer.write(HEALTH + HEALTH[:9])
        await peer.reply()
        await until(lambda: peer.is_closed)


async def test_idle_connections_are_closed_at_last() -> None:
    async with served(idle_s=0.3, head_s=FOR_LONG) as server:
        kept, new = await server.connect(2)
        kept.writer.write(HEALTH)
        await kept.reply()
        await until(lambda: kept.is_closed)
        assert not new.is_closed


async def test_idle_connections_give_their_places_to_others() -> None:
    """Checks that idle connections, also those with an incomplete head, are closed in favour of a new one."""
    async with served(max_requests=4, head_s=FOR_LONG) as server:  # 12 places
        for peer in await server.connect(12):
            peer.writer.write(HEALTH)
            await peer.reply()
        for peer in server.peers[:6]:
            peer.writer.write(HEALTH[:9])
        assert await server.answers()
        await until(lambda: any(peer.is_closed for peer in server.peers))


async def test_a_refused_request_whose_body_never_ends_is_closed_in_time() -> None:
    async with served(head_s=0.3) as server:
        (peer,) = await server.connect()
        peer.writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 999\r\n\r\n")
        assert (await peer.head()).startswith(b"HTTP/1.1 403")
        drip = asyncio.create_task(peer.drip(b"x" * 900, 0.05))
        with suppress(ConnectionError):
            await peer.reader.read()
        await drip


async def test_requests_take_longer_than_a_head_may() -> None:
    async with served(head_s=0.2) as server:
        server.engine.gate.clear()
        answer = asyncio.create_task(server.answers())
        await until(lambda: server.engine.running == 1)
        (silent,) = await server.connect()
        await until(lambda: silent.is_closed)
        server.engine.gate.set()
        assert await answer


async def test_idle_connections_beyond_the_bound_do_not_block_requests() -> None:
    """Checks that the connections that are idle longest are closed and that running requests keep theirs."""
    async with served(max_requests=8, head_s=FOR_LONG) as server:
        server.engine.gate.clear()
        running = asyncio.create_task(server.answers())
        await until(lambda: server.engine.running == 1)
        for _ in range(10):
            await server.connect(30)
            async with httpx.AsyncClient(base_url=server.address, trust_env=False, timeout=5) as http:
                assert (await http.get("/health")).status_code == 200
        await until(lambda: sum(not peer.is_closed for peer in server.peers) <= 23)
        assert not any(peer.is_closed for peer in server.peers[-10:])
        server.engine.gate.set()
        assert await running


async def test_a_full_server_answers_503_with_retry_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills a server whose process may open only 11 files."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (11, 11))
    async with served(max_requests=4, head_s=FOR_LONG) as server:
        for peer in await server.connect(4):  # their bodies are still to come
            peer.writer.write(b"POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n")
            peer.writer.write(b"Expect: 100-continue\r\n\r\n")
        await asyncio.gather(*(peer.head() for peer in server.peers))
        (late,) = await server.connect()
        assert (await late.head()).startswith(b"HTTP/1.1 503 ")
        await until(lambda: late.is_closed)


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="of Linux alone")
async def test_a_client_that_never_reads_is_disconnected() -> None:
    async with served(unread_s=0.5) as server:
        (peer,) = await server.connect()
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        with suppress(ConnectionError):
            while True:
                peer.writer.write(HEALTH.replace(b"/health", b"/metrics") * 100)
                await peer.writer.drain()
        assert await server.answers()


async def test_places_are_bounded_by_the_files_that_may_be_open() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
        config = server_config(make_app(ScriptedEngine(says("Hi"))), ApiSettings(), PORT)
        config.load()
        connection: Any = config.http_protocol_class(config=config, server_state=ServerState(), app_state={})  # type: ignore[call-arg]
        assert connection.room.places == 75
        allow_many_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_writes_to_a_disconnected_client_are_not_logged() -> None:
    """Checks that nothing is logged for many writes before the disconnect is noticed."""
    async with served() as server:
        (peer,) = await server.connect()
        peer.writer.transport.abort()
        for _ in range(20):
            peer.writer.transport.write(HEALTH)


async def test_garbage_leaves_no_line_in_the_log() -> None:
    async with served() as server:
        for peer in await server.connect(50):
            peer.writer.write(b"\x16\x03\x01 garbage\r\n\r\n")
        for peer in server.peers:
            assert (await peer.reader.read()).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("path", ["/nope", "/tokenize", "/v1/completions"])
async def test_a_bad_chunk_behind_a_head_leaves_no_line_in_the_log(path: str) -> None:
    async with served() as server:
        for peer in await server.connect(20):
            head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n"
            peer.writer.write(head.encode() + b"ZZ\r\n")
        for peer in server.peers:
            assert (await peer.reader.read()).startswith(b"HTTP/1.1 4")


async def test_heads_and_chunks_that_cost_more_than_they_weigh_are_refused() -> None:
    head = b"POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\n"
    async with served() as server:
        lines, chunks, fair = await server.connect(3)
        lines.writer.write(head + 5000 * b"a: b\r\n")
        chunks.writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n" + 20_000 * b"1\r\n \r\n")
        body = b'{"content": "a b"}'
        parts = b"".join(b"1\r\n%b\r\n" % body[at : at + 1] for at in range(len(body)))
        fair.writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n" + parts + b"0\r\n\r\n")
        assert (await lines.head()).startswith(b"HTTP/1.1 431")
        assert (await chunks.head()).startswith(b"HTTP/1.1 400")
        assert (await fair.head()).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    ("request_bytes", "status", "code", "cause"),
    [
        (b"\x16\x03\x01 garbage\r\n\r\n", 400, "bad_http", "illegal request line"),
        (HEALTH.replace(b"HTTP/1.1\r\n", b"HTTP/1.1\r\n" + 300 * b"a: b\r\n"), 431, "head_too_large", "200 headers"),
        (b"GET /health HTTP/1.1\r\na: " + b"b" * 99_999, 431, "head_too_large", "65536 bytes"),
        (HEALTH.replace(b"GET", b"POST")[:-2] + b"Transfer-Encoding: gzip\r\n\r\n", 501, "not_supported", "chunked"),
    ],
)
async def test_the_reply_to_what_is_no_http_names_its_cause(
    request_bytes: bytes, status: int, code: str, cause: str
) -> None:
    async with served() as server:
        (peer,) = await server.connect()
        peer.writer.write(request_bytes)
        head, _, body = (await peer.reader.read()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status) and b"Content-Type: application/json" in head
    error = json.loads(body)["error"]
    assert error["code"] == code and cause in error["message"]


async def test_a_request_of_two_lengths_is_refused() -> None:
    """Checks for request smuggling: a proxy may use the other length and take a request for the rest of the body."""
    async with served() as server:
        (peer,) = await server.connect()
        head = b"POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
        peer.writer.write(head + b"0\r\n\r\n")
        assert (await peer.head()).startswith(b"HTTP/1.1 400")
        assert b"not both" in await peer.reader.read()
        assert server.engine.submitted == []


@pytest.mark.parametrize("header", ["X-Forwarded-For", "X-Real-IP", "Forwarded"])
async def test_a_client_does_not_choose_its_own_address(header: str) -> None:
    """Checks that headers do not change the address, by which clients without keys take turns."""
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["client"][0])
        await Response()(scope, receive, send)

    async with serving(app) as address, httpx.AsyncClient(base_url=address, trust_env=False) as http:
        assert (
            await http.get("/", headers={header: "for=192.0.2.1" if header == "Forwarded" else "192.0.2.1"})
        ).is_success
    assert seen == ["127.0.0.1"]
