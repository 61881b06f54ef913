"""Tests of a static worker with several addresses to join, some of which belong to other programs by now."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from support.clusters.command_line import command_line
from support.clusters.launched import model_in
from support.clusters.static_cluster import (
    ANY_PORT,
    join_port,
    logged,
    named,
    new_trust,
    ready,
    start_coordinator,
    start_worker,
)
from support.network.loopback import free_port


@contextmanager
def answering(text: bytes) -> Iterator[int]:
    """Yields the port of a program that sends this on every connection and keeps it open."""
    with ExitStack() as taken, socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with suppress(OSError):
                while True:
                    connection = taken.enter_context(server.accept()[0])
                    with suppress(OSError):
                        connection.sendall(text)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_an_address_that_is_another_programs_ends_no_worker(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The port of a former coordinator may be any program's: here an HTTP server, a silent one, and another cluster."""
    model = model_in(tmp_path_factory)
    with command_line() as line, answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as http, answering(b"") as silent:
        new_trust(line)
        ours, theirs = free_port(), free_port()
        wrong = [f"127.0.0.1:{port}" for port in (silent, theirs)]
        addresses = [
            "--join",
            wrong[0],
            "--join",
            wrong[1],
            "--join",
            "no-host.invalid:1",
            "--join",
            f"127.0.0.1:{ours}",
        ]
        worker = start_worker(line, http, "a", *addresses)
        other = start_coordinator(line, model, name="other", join=ANY_PORT | {"listen": wrong[1]}, workers=named("a"))
        join_port(other)
        logged(worker, "does not belong to the token's cluster")
        coordinator = start_coordinator(
            line, model, join=ANY_PORT | {"listen": f"127.0.0.1:{ours}"}, workers=named("a")
        )
        with ready(coordinator, line) as cluster:
            assert cluster.status["workers"][0]["layers"] == [0, 6]
            coordinator.press_ctrl_c()
        assert worker.wait().code == 0
        other.press_ctrl_c()
        refused = start_worker(line, http, "a", "--join", f"localhost:{http}").wait()
        assert refused.code == 2 and "does not use TLS" in refused.err
