"""Tests of streams whose connections end without a close, like those of a machine that lost power."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from llamaclust import AsyncClient
from llamaclust.cluster.client import http
from llamaclust.cluster.client.http import ResumableStream
from llamaclust.core.errors import LlamaclustError

URL = httpx.URL("http://127.0.0.1:1")
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
TEXT = ["one ", "two ", "three"]


def event(number: int) -> bytes:
    choice = {"index": 0, "text": TEXT[number], "token_ids": [number], "finish_reason": None}
    choice |= {"logprobs": {"token_logprobs": [-1.0]}}
    return f"id: x:{number + 1}\ndata: {json.dumps({'choices': [choice]})}\n\n".encode()


@asynccontextmanager
async def silent_server() -> AsyncIterator[tuple[str, list[str]]]:
    """Yields a server's address and the `Last-Event-ID` values that clients sent. Each connection gets one event and
    then silence; the last one ends the stream."""
    had: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        had.append(head.partition("last-event-id: ")[2].partition("\r\n")[0])
        number = len(had) - 1
        writer.write(HEAD + event(number) + (b"data: [DONE]\n\n" if number == len(TEXT) - 1 else b""))
        await writer.drain()
        if number == len(TEXT) - 1:
            writer.close()
        else:
            await asyncio.sleep(60)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", had
    finally:
        server.close()


async def test_a_silent_stream_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "READ_TIMEOUT_S", 3.0)
    async with silent_server() as (url, had), AsyncClient(url) as client, asyncio.timeout(60):
        chunks = [chunk async for chunk in client.generate("abc", stream=True)]
    assert "".join(chunk.text for chunk in chunks) == "".join(TEXT)
    assert had == ["", "x:1", "x:2"]


@pytest.mark.parametrize("error", [httpx.ConnectTimeout, httpx.ReadTimeout, httpx.WriteTimeout, httpx.ReadError])
def test_what_may_pass_is_retried_for_a_while(error: type[httpx.HTTPError], monkeypatch: pytest.MonkeyPatch) -> None:
    stream = ResumableStream(URL)
    stream.opened(httpx.Response(200, headers={"content-type": "text/event-stream"}), b"")
    assert 0 < stream.pause_s(error("lost")) < 2
    monkeypatch.setattr(http, "_RESUME_S", -1.0)
    with pytest.raises(LlamaclustError, match="is the cluster up"):
        stream.pause_s(error("lost"))


@pytest.mark.parametrize(
    ("status", "body", "is_retried"),
    [
        (502, b"<html>502 Bad Gateway</html>", True),
        (503, b"", True),
        (504, b"stream timeout", True),
        (500, b"<html>500 Internal Server Error</html>", False),
        (404, b"<html>404 Not Found</html>", False),
        (503, b'{"error": {"message": "w: lost", "code": "worker_failed"}}', False),
        (503, b'{"error": {"message": "stopping", "code": "cluster_stopping"}}', True),
    ],
)
def test_a_proxy_that_reaches_no_server_is_asked_again(status: int, body: bytes, is_retried: bool) -> None:
    stream = ResumableStream(URL)
    stream.opened(httpx.Response(200, headers={"content-type": "text/event-stream"}), b"")
    with pytest.raises(LlamaclustError) as refused:
        stream.opened(httpx.Response(status), body)
    if is_retried:
        assert stream.pause_s(refused.value) > 0
    else:
        with pytest.raises(LlamaclustError) as raised:
            stream.pause_s(refused.value)
        assert raised.value is refused.value


def test_an_event_that_was_cut_off_behind_its_id_is_read_again() -> None:
    stream, begun = ResumableStream(URL), httpx.Response(200, headers={"content-type": "text/event-stream"})
    stream.opened(begun, b"")
    assert [*stream.feed(b'id: x:1\ndata: {"a": 1}\n\nid: x:2\ndata: {"a"')] == [{"a": 1}]
    stream.opened(begun, b"")
    with pytest.raises(LlamaclustError, match="stopping"):
        [*stream.feed(b'data: {"error": {"message": "stopping", "code": "cluster_stopping"}}\n\n')]
    assert stream.headers["Last-Event-ID"] == "x:1"


def test_a_request_that_no_server_took_is_not_sent_again() -> None:
    stream = ResumableStream(URL)
    with pytest.raises(LlamaclustError, match="does not answer"):
        stream.pause_s(httpx.ConnectTimeout("lost"))
    assert not stream.must_cancel


@pytest.mark.parametrize("error", [httpx.ReadError, httpx.RemoteProtocolError])
def test_a_connection_that_is_lost_before_the_reply_is_tried_again(error: type[httpx.HTTPError]) -> None:
    """Simulates a coordinator that is killed after it has journaled the request, and its restart."""
    stream = ResumableStream(URL)
    assert stream.pause_s(error("lost")) < 1
    for _ in range(10):
        assert stream.pause_s(httpx.ConnectError("refused")) < 2
    stream.opened(httpx.Response(200, headers={"content-type": "text/event-stream"}), b"")
    assert [*stream.feed(event(0))]
    assert stream.must_cancel


async def test_a_port_that_ends_every_connection_is_not_tried_for_long() -> None:
    keys: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        keys.append(head.partition("idempotency-key: ")[2].partition("\r\n")[0])
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, AsyncClient(url) as client, asyncio.timeout(60):
        with pytest.raises(LlamaclustError, match="ended the connection"):
            await client.generate("abc")
    assert len(keys) == http._MOST_UNANSWERED
    assert len(set(keys)) == 1  # the server can tell that it is the same request
    assert keys[0]


async def test_a_request_that_is_given_up_before_its_reply_begins_is_cancelled() -> None:
    """Checks that the client sends DELETE, since a server takes a closed connection for a broken one and goes on."""
    lines = asyncio.Queue[str]()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        await lines.put(head.partition("\r\n")[0])
        if head.startswith("DELETE"):
            writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
            writer.close()
        else:
            await reader.read()

    async def read() -> None:
        async for _ in client.generate("abc", stream=True):
            raise AssertionError

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, AsyncClient(url) as client, asyncio.timeout(60):
        reading = asyncio.create_task(read())
        assert (await lines.get()).startswith("POST /v1/completions")
        reading.cancel()
        assert (await lines.get()).startswith("DELETE /v1/streams/")
        await asyncio.wait([reading])


class Clock:
    """A clock that a test sets, in place of the module's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(http, "monotonic", lambda: self.now_s)


def test_servers_that_take_a_stream_again_are_given_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates coordinators that are killed in succession, each before it sends a new event."""
    clock, stream = Clock(monkeypatch), ResumableStream(URL)
    taken = httpx.Response(200, headers={"content-type": "text/event-stream"})
    for _ in range(10):
        stream.opened(taken, b"")
        stream.pause_s(httpx.ReadError("lost"))
        clock.now_s += 50
    stream.opened(taken, b"")
    clock.now_s += 120
    with pytest.raises(LlamaclustError, match="ended the connection"):  # 620 s without an event
        stream.pause_s(httpx.ReadError("lost"))


def test_comments_do_not_prolong_a_stream_without_events(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(monkeypatch), ResumableStream(URL)
    taken = httpx.Response(200, headers={"content-type": "text/event-stream"})
    assert len([*stream.feed(event(0))]) == 1

    def lose() -> None:
        stream.opened(taken, b"")
        assert [*stream.feed(b": waiting\n\n")] == []
        clock.now_s += 20
        stream.pause_s(httpx.ReadError("lost"))

    most = int(http._MOST_S) // 20
    for _ in range(most + 1):
        lose()
    with pytest.raises(LlamaclustError, match="ended the connection"):
        lose()
    assert len([*stream.feed(event(1))]) == 1
    for _ in range(most + 1):  # the time begins again at an event
        lose()
