"""Checks that the client fails in time if a local server sends endless headers or an endless end of a body."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from llamaclust.core.errors import DownloadError
from llamaclust.tools.hub import web_client
from llamaclust.tools.hub.download import Download, DownloadLimits, fetch
from llamaclust.tools.hub.pull import pull_model
from llamaclust.tools.hub.web_client import WebClient, failure
from support.hub.download_server import Server, running_server

QUICK = DownloadLimits(tries=3, first_pause_s=0.01, longest_pause_s=0.05, deadline_s=30.0)
MODEL = b"GGUF" + random.Random(11).randbytes(99_996)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running_server() as served:
        served.does.files["/m.gguf"] = MODEL
        yield served


@pytest.fixture
def expiring(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the deadline for headers expire when an answer without their end has begun, and never before."""
    timers: list[threading.Timer] = []

    class Timer(threading.Timer):
        def start(self) -> None:
            timers.append(self)
            super().start()

    def expire() -> None:
        while not timers or timers[-1].finished.is_set():
            time.sleep(0.002)
        timers[-1].function()

    monkeypatch.setattr(web_client, "Timer", Timer)
    server.does.at_drip = expire


@pytest.mark.usefixtures("expiring")
def test_header_lines_without_an_end_are_cut_off(server: Server) -> None:
    """Checks endless headers on a connection that has served a request before."""
    with WebClient(timeout=60.0) as client:
        assert client.get(f"{server.url}/m.gguf").content == MODEL
        server.does.drips = 1
        with pytest.raises(httpx.ReadTimeout, match="headers took longer than 60 s"):
            client.get(f"{server.url}/m.gguf")
        assert len(server.does.connections) == 1
        assert client.get(f"{server.url}/m.gguf").content == MODEL, "the client goes on"


@pytest.mark.usefixtures("expiring")
def test_a_download_tries_again_and_ends(server: Server, tmp_path: Path) -> None:
    with WebClient(timeout=60.0) as client:
        server.does.drips = 2
        fetch(client, Download(f"{server.url}/m.gguf", sha256=None), tmp_path / "a", lambda *_: None, QUICK)
        assert (tmp_path / "a").read_bytes() == MODEL
        server.does.drips = 99
        with pytest.raises(DownloadError, match=r"headers took longer than 60 s \(3 tries without progress"):
            fetch(client, Download(f"{server.url}/m.gguf", sha256=None), tmp_path / "b", lambda *_: None, QUICK)


def test_a_pull_has_that_deadline(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WebClient.__init__, "__kwdefaults__", {"headers_s": 0.3, "body_s": web_client.BODY_S})
    server.does.drips = 99
    with pytest.raises(DownloadError, match="headers took longer"):
        pull_model(f"{server.url}/m.gguf", models_dir=tmp_path, limits=QUICK)


@contextmanager
def answering_for_ever(begin: bytes, line: bytes) -> Iterator[str]:
    """Serves `begin` and then `line` repeatedly as every answer; yields the URL."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(begin)
                    while True:
                        connection.sendall(line)
                        time.sleep(0.02)
            except OSError:
                if closing.is_set():
                    return

    closing = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        closing.set()
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_a_body_that_never_ends_is_cut_off() -> None:
    """Checks a complete chunked body that endless trailer lines follow."""
    begin = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"
    with (
        answering_for_ever(begin, b"X-More: to come\r\n") as url,
        WebClient(body_s=0.3, timeout=10.0) as client,
        pytest.raises(httpx.TransportError),
    ):
        client.get(url)


def test_a_host_without_an_address_may_be_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with WebClient(trust_env=False) as client, pytest.raises(httpx.ConnectError) as caught:
        client.get("http://no-such-host.invalid/")
    assert failure(caught.value).endswith("not known: no network? HF_ENDPOINT names a mirror of the Hugging Face hub")
    assert failure(httpx.ConnectError("refused")) == "refused" and failure(httpx.ReadError("")) == "ReadError"
