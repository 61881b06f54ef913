"""Tests of the API over TLS, on real sockets: clients, bounds on handshakes, ends of connections, renewal."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from llamaclust import AsyncClient, Client
from llamaclust.cluster.front.http.certificate import CertificateFiles, ServerCertificate
from llamaclust.cluster.front.http.connections import ApiPort
from llamaclust.cluster.front.http.server import StartingReplies
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.core.errors import LlamaclustError
from support.clusters.served import MODEL, ScriptedEngine, make_app, says, serving, until
from support.event_loop import pass_time
from support.wire.api_certificates import SignedFiles, self_signed, write_signed

ANSWER = "The cat sat."
PROMPT = {"prompt": "a", "max_tokens": 40}
FOR_LONG = 60.0


@dataclass
class Secured:
    """A served app, its certificate files and its connections, which are closed after the test."""

    url: str
    signed: SignedFiles
    certificate: ServerCertificate
    engine: ScriptedEngine
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("https://").rpartition(":")
        return host, int(port)

    @property
    def trusted(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.signed.ca)

    def http(self, **options: Any) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, verify=self.trusted, trust_env=False, timeout=20, **options)

    async def connect(self, context: ssl.SSLContext | None = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Opens a connection for raw bytes, without a handshake if `context` is None."""
        host = None if context is None else "localhost"
        reader, writer = await asyncio.open_connection(*self.address, ssl=context, server_hostname=host)
        self.writers.append(writer)
        return reader, writer


@asynccontextmanager
async def secured(folder: Path, **settings: Any) -> AsyncIterator[Secured]:
    signed = write_signed(folder)
    certificate = ServerCertificate(signed.files)
    engine = ScriptedEngine(says(ANSWER))
    limits = ApiSettings(**settings)
    async with serving(make_app(engine, **settings), limits, certificate) as url:
        server = Secured(url, signed, certificate, engine)
        try:
            yield server
        finally:
            for writer in server.writers:
                writer.transport.abort()


@pytest.fixture(autouse=True)
def _nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert [record.message for record in caplog.get_records("call") if record.levelno >= logging.WARNING] == []


# -- clients -----------------------------------------------------------------------------------------------------------


async def test_httpx_gets_answers_and_streams(tmp_path: Path) -> None:
    async with secured(tmp_path) as server, server.http() as http:
        reply = await http.post("/v1/completions", json=PROMPT)
        assert reply.status_code == 200 and reply.json()["choices"][0]["text"] == ANSWER
        async with http.stream("POST", "/v1/completions", json={**PROMPT, "stream": True}) as stream:
            lines = [line async for line in stream.aiter_lines() if line.startswith("data: {")]
        assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines) == ANSWER
        assert (await http.get("/health", headers={"origin": server.url})).status_code == 200
        plain_page = server.url.replace("https", "http")
        assert (await http.get("/health", headers={"origin": plain_page})).status_code == 403


async def test_openais_client_works_unchanged(tmp_path: Path) -> None:
    async with secured(tmp_path) as server:
        http = DefaultAsyncHttpxClient(verify=server.trusted)
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http) as client:
            reply = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}])
            assert reply.choices[0].message.content == ANSWER
            stream = await client.completions.create(model=MODEL, prompt="a", max_tokens=40, stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == ANSWER


async def test_this_programs_clients_trust_a_file_and_refuse_without_it(tmp_path: Path) -> None:
    async with secured(tmp_path) as server:
        ca = server.signed.ca

        def answer(verify: Path | None) -> str:
            with Client(server.url, verify=verify) as client:
                return client.generate("a", max_tokens=40).text

        assert await asyncio.to_thread(answer, ca) == ANSWER
        async with AsyncClient(server.url, verify=ca) as client:
            assert (await client.generate("a", max_tokens=40)).text == ANSWER
        with pytest.raises(LlamaclustError, match=r"not trusted here \(.*--ca-file"):
            await asyncio.to_thread(answer, None)
        async with AsyncClient(server.url) as client:
            with pytest.raises(LlamaclustError, match="not trusted here"):
                await client.tokenize("a")


async def test_bodies_that_are_too_large_get_their_error(tmp_path: Path) -> None:
    async with secured(tmp_path, max_body_bytes=100_000) as server, server.http() as http:
        refused = await http.post("/tokenize", content=b"x" * (4 << 20))
        assert refused.status_code == 413


class _Burst(asyncio.Protocol):
    """A protocol that writes 8 MiB at once and closes the connection."""

    size = 8 << 20

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data * self.size)
        self.transport.close()


async def test_what_was_written_before_the_end_arrives(tmp_path: Path) -> None:
    port = ApiPort(socket.create_server(("127.0.0.1", 0)), self_signed(tmp_path))
    async with await asyncio.get_running_loop().create_server(lambda: port.carrying(_Burst()), sock=port.listener):
        context = ssl.create_default_context(cafile=tmp_path / "api.crt")
        reader, writer = await asyncio.open_connection(
            *port.listener.getsockname(), ssl=context, server_hostname="localhost"
        )
        writer.write(b"x")
        received = 0
        while data := await reader.read(1 << 16):
            received += len(data)
        assert received == _Burst.size
        writer.close()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
async def test_both_versions_of_tls(tmp_path: Path, version: ssl.TLSVersion) -> None:
    async with secured(tmp_path) as server:
        context = server.trusted
        context.minimum_version = context.maximum_version = version
        context.set_alpn_protocols(["h2", "http/1.1"])
        reader, writer = await server.connect(context)
        encryption = writer.get_extra_info("ssl_object")
        assert encryption.version() == version.name.replace("_", ".") and (
            encryption.selected_alpn_protocol() == "http/1.1"
        )
        for _ in range(3):  # on one connection
            writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            assert await reader.readuntil(b"}") == b'{"status":"ok"}'


# -- bounds ------------------------------------------------------------------------------------------------------------


async def test_handshakes_that_do_not_come_are_cut_off_and_block_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with secured(tmp_path, head_s=60.0) as server:
        hello = _client_hello(server.trusted)
        silent = [await server.connect() for _ in range(10)]
        begun = [await server.connect() for _ in range(10)]
        for _, writer in begun:
            writer.write(hello[:50])
        async with server.http() as http:
            assert (await http.post("/v1/completions", json=PROMPT)).status_code == 200
        pass_time(monkeypatch, 60.0)
        for reader, _ in (*silent, *begun):
            assert await asyncio.wait_for(reader.read(), 20) == b""


async def test_handshakes_beyond_the_bound_give_way_to_others(tmp_path: Path) -> None:
    async with secured(tmp_path, max_requests=4, head_s=FOR_LONG) as server:  # 12 places
        readers: list[asyncio.StreamReader] = []
        for _ in range(5):
            readers += [(await server.connect())[0] for _ in range(12)]
            async with server.http() as http:
                assert (await http.get("/health")).status_code == 200
        await until(lambda: sum(not reader.at_eof() for reader in readers) <= 12)


async def test_a_client_that_does_not_agree_to_an_end_holds_no_connection(tmp_path: Path) -> None:
    """Checks that the server does not wait for a client's answer to the end of TLS."""
    async with secured(tmp_path) as server:
        connection = await asyncio.to_thread(_request_that_ends, server.address, server.trusted)
        with connection:
            end = await asyncio.to_thread(_raw_rest, connection)
        assert end == b""


async def test_a_client_that_never_reads_is_disconnected(tmp_path: Path) -> None:
    async with secured(tmp_path, unread_s=0.5) as server:
        _, writer = await server.connect(server.trusted)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        with suppress(ConnectionError, ssl.SSLError):
            while True:
                writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
                await writer.drain()
        async with server.http() as http:
            assert (await http.get("/health")).status_code == 200


async def test_what_is_not_tls_gets_one_clear_reply(tmp_path: Path) -> None:
    async with secured(tmp_path) as server:
        plain = server.url.replace("https", "http")
        async with httpx.AsyncClient(trust_env=False) as http:
            reply = await http.post(f"{plain}/v1/completions", json=PROMPT)
        assert reply.status_code == 400 and reply.json()["error"]["code"] == "https_required"
        async with AsyncClient(plain) as client:
            with pytest.raises(LlamaclustError, match="write https:// in its address"):
                await client.tokenize("a")
        reader, writer = await server.connect()
        writer.write(b"\x00garbage\r\n\r\n")
        await asyncio.wait_for(reader.read(), 20)
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        with pytest.warns(DeprecationWarning):
            old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await server.connect(old)


async def test_https_to_a_port_without_tls_says_so() -> None:
    async with (
        serving(make_app(ScriptedEngine(says(ANSWER)))) as url,
        AsyncClient(url.replace("http", "https")) as client,
    ):
        with pytest.raises(LlamaclustError, match="write http:// in its address"):
            await client.tokenize("a")


# -- renewal, start ----------------------------------------------------------------------------------------------------


async def test_new_connections_see_a_renewed_certificate_and_streams_go_on(tmp_path: Path) -> None:
    async with secured(tmp_path) as server, server.http() as http:
        server.engine.gate.clear()
        running = asyncio.create_task(http.post("/v1/completions", json=PROMPT))
        await until(lambda: server.engine.running == 1)
        shown = await _shown(server)
        write_signed(tmp_path)
        for _ in range(2):
            server.certificate.look()
        assert await _shown(server) not in (shown, None)
        server.engine.gate.set()
        assert (await running).json()["choices"][0]["text"] == ANSWER


async def test_files_are_watched_while_the_port_is_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the folder of both files at once, like Kubernetes replaces a secret's files."""
    monkeypatch.setattr("llamaclust.cluster.front.http.certificate._LOOK_S", 0.01)
    shown = tmp_path / "shown"
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        write_signed(tmp_path / name)
        (tmp_path / f"to-{name}").symlink_to(name)
    (tmp_path / "to-old").rename(shown)
    certificate = ServerCertificate(CertificateFiles(shown / "tls.crt", shown / "tls.key"))
    before = certificate.fingerprint
    with certificate.watched():
        (tmp_path / "to-new").rename(shown)
        await until(lambda: certificate.fingerprint != before)


async def test_a_cluster_that_starts_answers_over_tls(tmp_path: Path) -> None:
    certificate = self_signed(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = ApiPort(listener, certificate)
        async with (
            StartingReplies(port, ApiSettings(), lambda event: None),
            httpx.AsyncClient(verify=ssl.create_default_context(cafile=tmp_path / "api.crt"), timeout=20) as http,
        ):
            silent = [await asyncio.open_connection(*listener.getsockname()) for _ in range(8)]
            for body in (b"", b"x" * 3_000_000):
                reply = await http.post(f"{port.url}/v1/completions", content=body)
                assert reply.status_code == 503 and reply.json()["error"]["code"] == "cluster_starting"
            for _, writer in silent:
                writer.close()


# -- by hand -----------------------------------------------------------------------------------------------------------


def _client_hello(context: ssl.SSLContext) -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


async def _shown(server: Secured) -> bytes | None:
    _, writer = await server.connect(server.trusted)
    certificate: bytes | None = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    return certificate


def _request_that_ends(address: tuple[str, int], context: ssl.SSLContext) -> socket.socket:
    """Returns the TCP connection below TLS after the complete reply to its last request."""
    secured = context.wrap_socket(socket.create_connection(address, 20), server_hostname="localhost")
    secured.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    received = b""
    while b'"ok"}' not in received:
        received += secured.recv(4096)
    return socket.socket(fileno=secured.detach())


def _raw_rest(connection: socket.socket) -> bytes:
    """Skips TLS' closing messages and returns b"" at the end of the connection."""
    connection.settimeout(20)
    while connection.recv(4096):
        pass
    return b""
