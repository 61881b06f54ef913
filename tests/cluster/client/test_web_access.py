"""Checks that errors name unusable environment variables of HTTP clients, and that this machine needs no proxy."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

import certifi
import httpx
import pytest

from llamaclust import AsyncClient, Client
from llamaclust.cluster.client.http import unreachable
from llamaclust.cluster.client.web_access import proxy_note, web_options
from llamaclust.core.errors import UsageError
from llamaclust.core.interfaces import own_addresses
from llamaclust.tools.hub.web_client import failure

ELSEWHERE = "https://192.0.2.1:9"
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://127.0.0.1:1"),
        ("all_proxy", "socks5h://127.0.0.1:1"),
        ("HTTPS_PROXY", "http://[::1"),
        ("https_proxy", "http://proxy:99999"),
        ("HTTP_PROXY", "ftp://proxy:21"),
        ("http_proxy", "http://"),
        ("HTTPS_PROXY", "proxy:port"),
        ("NO_PROXY", "localhost, [::1"),
        ("SSL_CERT_FILE", "/no/such/file.pem"),
        ("SSL_CERT_FILE", os.devnull),
        ("SSL_CERT_FILE", __file__),
        ("SSLKEYLOGFILE", "/no/such/folder/keys"),
    ],
)
def test_a_variable_that_cannot_be_used_is_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"^{name}=") as refused:
        Client(ELSEWHERE)
    assert "\n" not in str(refused.value) and value in str(refused.value)
    with pytest.raises(UsageError, match=f"^{name}="):
        web_options(None)
    Client("http://127.0.0.1:9").close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HTTPS_PROXY", "http://user:word@proxy.example:3128"),
        ("HTTP_PROXY", "proxy.example:3128"),
        ("ALL_PROXY", "http://[::1]:3128"),
        ("NO_PROXY", "localhost,127.0.0.1,::1,10.0.0.0/8,.example,*"),
        ("no_proxy", "https://inside.example"),
        ("HTTPS_PROXY", ""),
    ],
)
def test_variables_that_can_be_used(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with httpx.Client(**web_options(httpx.URL(ELSEWHERE))):
        pass


def test_small_letters_count_before_capital_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "ftp://unused")
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    web_options(None)


def test_this_machine_has_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://proxy.example:3128")
    own = [f"[{host}]" if ":" in host else host for host in own_addresses()]
    for host in ("127.0.0.1", "127.8.7.6", "localhost", "[::1]", "0.0.0.0", *own):
        assert web_options(httpx.URL(f"http://{host}:9"))["trust_env"] is False, host
    with httpx.Client(**web_options(None)) as client:
        for host in ("127.0.0.1", "localhost", "[::1]"):
            assert client._transport_for_url(httpx.URL(f"http://{host}:9")) is client._transport
        assert client._transport_for_url(httpx.URL(ELSEWHERE)) is not client._transport


def test_a_log_of_keys_is_not_taken_for_the_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path))
    with pytest.raises(UsageError, match=r"^SSLKEYLOGFILE="):
        Client(ELSEWHERE, verify=certifi.where())


async def test_requests_do_not_wait_for_the_connections_of_others() -> None:
    most = 120
    together = asyncio.Barrier(most)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await together.wait()
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 14\r\n\r\n{"tokens":[7]}')

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=most)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with AsyncClient(url) as client, asyncio.timeout(30):
        replies = await asyncio.gather(*(client.tokenize("a") for _ in range(most)))
    server.close()
    assert replies == [[7]] * most


@contextmanager
def proxy_that_answers(reply: bytes) -> Iterator[int]:
    """Serves a proxy on loopback that answers each connection's first request with `reply`."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(4096)
                        connection.sendall(reply)

        thread = Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)


@pytest.mark.parametrize(
    ("variable", "url", "reply"),
    [
        ("http_proxy", "http://llamaclust.invalid:9", b""),
        ("HTTPS_PROXY", "https://llamaclust.invalid:9", b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"),
        ("https_proxy", "https://192.0.2.1:9", b"HTTP/1.1 502 Bad Gateway\r\n\r\n"),
        ("ALL_PROXY", "https://llamaclust.invalid", b"SSH-2.0-x\r\n"),
    ],
)
def test_an_error_names_the_proxy_without_its_password(
    variable: str, url: str, reply: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with proxy_that_answers(reply) as port:
        monkeypatch.setenv(variable, f"http://user:secret@127.0.0.1:{port}")
        client = httpx.Client(timeout=20, **web_options(httpx.URL(url)))
        with client, pytest.raises(httpx.HTTPError) as failed:
            client.get(url)
        for text in (str(unreachable(httpx.URL(url), failed.value)), failure(failed.value)):
            assert f"proxy http://127.0.0.1:{port} of the variable {variable}" in text and "secret" not in text
            assert "is the cluster up?" not in text
        monkeypatch.setenv("no_proxy", httpx.URL(url).host)
        assert proxy_note(failed.value) == ""


def test_no_proxy_is_named_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
    with httpx.Client(**web_options(httpx.URL(url))) as client, pytest.raises(httpx.ConnectError) as failed:
        client.get(url)
    assert "proxy" not in str(unreachable(httpx.URL(url), failed.value))
