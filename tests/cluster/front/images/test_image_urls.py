"""Checks that images are fetched once, only from allowed hosts at public addresses, and within limits."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from llamaclust.cluster.front.http.gates import Admission
from llamaclust.cluster.front.images import fetching
from llamaclust.cluster.front.images.fetching import fetch_images, is_public
from llamaclust.cluster.front.images.urls import ImageRules, ImageUrl
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.core.errors import DeadlineError, ParameterError
from support.chat.vision import TinyVision, image
from support.clusters.served import ScriptedEngine, client, make_app, says

IMAGE = image(2, b"from the web")
Answer = Callable[[bytes], bytes]


def http(status: str, body: bytes = b"", *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, f"content-length: {len(body)}", "", ""]).encode() + body


@asynccontextmanager
async def web_host(answer: bytes, asked: list[str]) -> AsyncIterator[int]:
    """Yields the port of a web server that always sends `answer` and adds the head of each request to `asked`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).decode().lower())
        writer.write(answer)
        await writer.drain()
        if b"content-length" not in answer:  # the reply never ends
            await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Resolves all names to 127.0.0.1, which counts as public, and returns the list of names looked up."""
    names: list[str] = []

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        names.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(fetching, "getaddrinfo", look_up)
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
    return names


PRIVATE = (
    "127.0.0.1 10.1.2.3 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1 255.255.255.255 ::1 :: "
    "fe80::1 fe80::1%eth0 fc00::1 ff02::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1 64:ff9b::a00:1 "
    "2002:7f00:1:: 2002:a00:1::1 2001:db8::1 64:ff9b:1::a00:1 ::ffff:0:127.0.0.1 ::127.0.0.1 fec0::1 3fff::1 5f00::1 "
    "192.0.0.8 192.0.0.170 192.0.0.255 192.88.99.1 192.31.196.7 192.52.193.1 192.175.48.42 198.19.255.254 240.0.0.1 "
    "203.0.113.9 2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:10::1 2001:1ff:ffff::1 2002:808:808::1 2620:4f:8000::1 "
    "::ffff:8.8.8.8 64:ff9b::c058:6301 64:ff9b::c000:8 64:ff9b:1::808:808 100:0:0:1::1 100::1"
)


@pytest.mark.parametrize("address", PRIVATE.split())
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("1.1.1.1", "93.184.216.34", "2606:4700::1111", "64:ff9b::101:101"),
        *("192.0.1.1", "192.88.98.255", "192.88.100.1", "198.17.0.1", "223.255.255.254", "2001:200::1", "2003::1"),
    ],
)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


RULES = ImageRules(("example.com", "*.images.example", "other.example:8080"))


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a.png",
        "HTTP://EXAMPLE.com",
        "https://example.com./a",
        "http://a.images.example/a?b=c",
        "https://other.example:8080/",
    ],
)
def test_allowed_urls(url: str) -> None:
    RULES.check(url)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/",
        "https://example.com.evil.example/",
        "https://notexample.com/",
        "https://images.example/",
        "https://example.com:8443/",
        "https://other.example/",
        "https://example.com/a\n.png",
        "https://exam\tple.com/",
        "https://example.com:b/",
        "https://[::1/",
        "https://user@example.com/",
        "https://example.com@evil.example/",
        "https://evil.example\\@example.com/",
        "https://evil.example/example.com",
        "https://example.com:x/",
        "https://[::1]/",
        "https://",
        "https://example.com/a b",
        "https://example.com/\r\nhost: evil",
        "https://exämple.com/",
        "https://example.com/" + "a" * 5000,
    ],
)
def test_urls_that_are_not_allowed(url: str) -> None:
    with pytest.raises(ValueError, match=r"expected a (host|plain)"):
        RULES.check(url)


def test_parts_of_a_url() -> None:
    assert ImageUrl.parse("http://A.example:8080?b=c#d") == ImageUrl("http", "a.example", 8080, "/?b=c")


async def test_an_image_is_fetched_once_from_the_address_that_was_checked(resolved: list[str]) -> None:
    asked: list[str] = []
    async with web_host(http("200 OK", IMAGE), asked) as port:
        url = f"http://example.com:{port}/a/b.png?c=d"
        assert await fetch_images([url], 1 << 20) == {url: IMAGE}
    assert len(asked) == 1 and asked[0].startswith("get /a/b.png?c=d http/1.1\r\n")
    assert f"host: example.com:{port}\r\n" in asked[0] and resolved == ["example.com"]


async def test_hosts_at_one_address_share_no_connection(resolved: list[str]) -> None:
    """Checks that each host has its own connection, so that its certificate is verified."""
    connections: list[list[str]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hosts: list[str] = []
        connections.append(hosts)
        with suppress(asyncio.IncompleteReadError):  # the client closes the connection
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                hosts += re.findall(r"host: ([a-z.]+)", head.decode().lower())
                writer.write(http("200 OK", IMAGE))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        urls = [f"http://{name}.example:{port}/" for name in "abb"]
        assert await fetch_images(urls, 1 << 20) == dict.fromkeys(urls, IMAGE)
    assert connections == [["a.example"], ["b.example"], ["b.example"]]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (
            http("302 Found", b"", "location: http://127.0.0.1:1/secret"),
            "found a redirect to http://127.0.0.1:1/secret",
        ),
        (http("404 Not Found", b"no"), "found 404"),
        (http("204 No Content"), "found 204"),
        (http("200 OK", b"x" * 200), "at most 100 bytes"),
        (http("200 OK", b"x", "content-encoding: gzip"), "found content-encoding gzip"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"50\r\n" + b"x" * 80 + b"\r\n" * 1, ""),
        (b"nonsense\r\n\r\n", "http://example.com"),
    ],
)
async def test_answers_that_are_refused(
    answer: bytes, reason: str, resolved: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(fetching, "_MAX_S", 0.5 if not reason else 20.0)
    async with web_host(answer, asked) as port, asyncio.timeout(60):
        with pytest.raises(ParameterError if reason else DeadlineError, match=reason or "longer than 0.5 s"):
            await fetch_images([f"http://example.com:{port}/"], 100)
    assert len(asked) == 1


async def test_all_images_of_a_request_share_the_bound(resolved: list[str]) -> None:
    async with web_host(http("200 OK", b"x" * 60), []) as port:
        urls = [f"http://example.com:{port}/{name}" for name in "ab"]
        with pytest.raises(ParameterError, match="/b: expected an image of at most 40 bytes"):
            await fetch_images(urls, 100)


async def test_hosts_at_private_addresses_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        return [(0, 0, 0, "", (address, port)) for address in ("1.1.1.1", "127.0.0.1")]

    monkeypatch.setattr(fetching, "getaddrinfo", look_up)
    async with web_host(http("200 OK", IMAGE), asked) as port:
        with pytest.raises(ParameterError, match=r"127\.0\.0\.1, which is not public"):
            await fetch_images([f"http://example.com:{port}/"], 1 << 20)
    assert not asked


@pytest.mark.parametrize("is_allowed", [True, False])
async def test_a_chat_with_a_url(is_allowed: bool, resolved: list[str]) -> None:
    asked: list[str] = []
    vision = TinyVision()
    async with web_host(http("200 OK", IMAGE), asked) as port:
        url = f"http://example.com:{port}/a.png"
        part = {"type": "image_url", "image_url": {"url": url}}
        hosts = (f"example.com:{port}",) if is_allowed else ()
        app = make_app(ScriptedEngine(says("a")), vision=vision, image_hosts=hosts)
        async with client(app) as web:
            body = {"messages": [{"role": "user", "content": [part, part]}]}
            reply = await web.post("/v1/chat/completions", json=body)
            block = {"type": "image", "source": {"type": "url", "url": url}}
            body = {"messages": [{"role": "user", "content": [block]}]}
            counted = await web.post("/v1/messages/count_tokens", json=body)
    if is_allowed:
        assert reply.status_code == 200 and counted.json()["input_tokens"] > IMAGE[0]
        assert [source.data for source in vision.images] == [IMAGE] * 3 and len(asked) == 2
    else:
        error = json.loads(reply.content)["error"]
        assert reply.status_code == counted.status_code == 400 and not asked
        expected = "messages[0]: content[0]: expected a host of api.image_urls in the cluster file, found example.com"
        assert expected in error["message"]


async def test_fetched_images_count_in_the_bytes_of_open_requests(resolved: list[str]) -> None:
    async with web_host(http("200 OK", image(2, b"x" * 3000)), []) as port:
        part = {"type": "image_url", "image_url": {"url": f"http://example.com:{port}/a.png"}}
        body = {"messages": [{"role": "user", "content": [part]}]}
        for held_bytes, status in ((2000, 503), (10_000, 200)):
            settings = ApiSettings(max_held_bytes=held_bytes)
            hosts, vision = (f"example.com:{port}",), TinyVision()
            app = make_app(ScriptedEngine(says("a")), admission=Admission(settings), vision=vision, image_hosts=hosts)
            async with client(app) as web:
                for _ in range(4):  # ended requests hold no bytes
                    reply = await web.post("/v1/chat/completions", json=body)
                    assert reply.status_code == status, reply.text
                    assert status == 200 or "the server is busy with" in reply.json()["error"]["message"]
