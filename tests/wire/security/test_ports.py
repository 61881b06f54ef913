"""Tests of a static cluster's ports: only the enrolment port answers clients without a certificate from other
machines."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

import psutil
import pytest

from support.clusters.command_line import CommandLine, Running, command_line
from support.clusters.static_cluster import join_port, named, ready, start_coordinator, start_worker
from support.models.tiny_model import build_tiny_model

EVERYWHERE = {"listen": "0.0.0.0:0", "members": "0.0.0.0:0"}
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
HTTP1 = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def line() -> Iterator[CommandLine]:
    with command_line() as line:
        yield line


@pytest.fixture(scope="module")
def cluster(line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Running]]:
    """Starts a coordinator and two workers that other machines can reach."""
    model = build_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", context=256)
    coordinator = start_coordinator(line, model, workers=named("a", "b"), join=EVERYWHERE)
    port = join_port(coordinator)
    where = ("--listen", "0.0.0.0:0", "--advertise", "127.0.0.1")
    workers = [start_worker(line, port, name, *where) for name in ("a", "b")]
    with ready(coordinator, line):
        yield [coordinator, *workers]
    coordinator.press_ctrl_c()


def listening(running: Running) -> list[tuple[str, int]]:
    """Returns the addresses and ports on which a process and its children listen."""
    process = psutil.Process(running.process.pid)
    found = [
        connection for member in (process, *process.children(recursive=True)) for connection in member.net_connections()
    ]
    return [
        (connection.laddr.ip, connection.laddr.port) for connection in found if connection.status == psutil.CONN_LISTEN
    ]


def says(port: int, sent: bytes) -> bytes:
    """Returns the bytes that a port answers to plain text."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as link:
        link.sendall(sent)
        heard = b""
        try:
            while part := link.recv(4096):
                heard += part
        except ConnectionError:
            pass
        return heard


def handshake(port: int) -> ssl.SSLSocket:
    """Opens a TLS connection without a client certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=20))


def test_beyond_loopback_only_the_enrolment_port_talks_to_strangers(cluster: list[Running]) -> None:
    enrolment = join_port(cluster[0])
    ports = {port for running in cluster for host, port in listening(running) if not host.startswith("127.")}
    # Enrolment, members, and for each worker a port for stages and a port for links.
    assert enrolment in ports and len(ports) == 6
    for port in ports:
        for sent in (HTTP1, HTTP2):
            heard = says(port, sent)
            assert b"HTTP" not in heard and len(heard) < 16, port  # At most a TLS alert.
    for port in ports - {enrolment}:
        with pytest.raises(OSError), handshake(port) as link:  # In TLS 1.3, the first read gets the error.
            link.sendall(HTTP2)
            assert link.recv(1) == b""
            raise ConnectionError("closed without a word")


def test_the_http_api_is_on_loopback(cluster: list[Running], line: CommandLine) -> None:
    api = next(port for host, port in listening(cluster[0]) if host.startswith("127."))
    assert b"HTTP/1.1 200" in says(api, HTTP1.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))


def test_the_enrolment_port_does_nothing_else(cluster: list[Running]) -> None:
    """The port sends the CA's certificate and a nonce. Any other request ends the connection."""
    enrolment = join_port(cluster[0])
    for sent in (HTTP1, HTTP2, b"\x00\x00\x00\x01\x00", b"\xff" * 64):
        with handshake(enrolment) as link:
            link.settimeout(20)
            size = int.from_bytes(link.recv(4), "big")
            challenge = link.recv(size)
            assert len(challenge) == size < 1024
            link.sendall(sent)
            heard = b""
            try:
                while part := link.recv(4096):
                    heard += part
            except OSError:
                pass
            assert heard == b""
