"""Tests of strangers that connect to the link ports of a serving group: they are rejected and change nothing."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import psutil
import pytest

from llamaclust.cluster.membership.authority import Authority
from llamaclust.core.limits import GROUP_ID_BYTES
from llamaclust.kernels._native import Link, LinkError, TlsSettings
from llamaclust.wire.security.certificate_names import Principal
from llamaclust.worker.groups.listener import Hello
from support.clusters.command_line import Cluster, CommandLine, Running, command_line, eventually
from support.clusters.static_cluster import join_port, named, ready, start_coordinator, start_worker, token_file
from support.models.tiny_model import build_tiny_model
from support.network.loopback import free_port
from support.seed import SEED
from support.wire.group_links import needs_tls

pytestmark = needs_tls

MEMBERS = "a", "b"
UNKNOWN = Hello(bytes(GROUP_ID_BYTES), 1, 0).encode()
REFUSED = "refused: a connection"
Stranger = Callable[[socket.socket, Authority], None]


@dataclass(frozen=True, slots=True)
class Attacked:
    """A cluster that is ready, and its workers' link ports."""

    cluster: Cluster
    workers: dict[str, Running]
    ports: dict[str, int]
    authority: Authority

    def descriptors(self) -> list[int]:
        return [psutil.Process(worker.process.pid).num_fds() for worker in self.workers.values()]

    def told(self) -> int:
        """Counts lines about refused connections."""
        return sum(worker.err.read_text().count(REFUSED) for worker in self.workers.values())


@pytest.fixture(scope="module")
def line() -> Iterator[CommandLine]:
    with command_line() as line:
        yield line


@pytest.fixture(scope="module")
def attacked(line: CommandLine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    model = build_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", context=256)
    plan = [{"workers": [*MEMBERS], "layers": [0, 6]}]
    coordinator = start_coordinator(line, model, workers=named(*MEMBERS), plan=plan)
    join, ports = join_port(coordinator), {name: free_port() for name in MEMBERS}
    workers = {name: start_worker(line, join, name, "--link-port", str(ports[name])) for name in MEMBERS}
    with ready(coordinator, line) as cluster:
        assert [worker["layers"] for worker in cluster.status["workers"]] == [[0, 6]] * 2
        yield Attacked(cluster, workers, ports, Authority.open(token_file(line).parent))
    coordinator.press_ctrl_c()


def says(data: bytes) -> Stranger:
    def say(connection: socket.socket, authority: Authority) -> None:
        with suppress(ConnectionError):  # the worker may have closed it
            connection.sendall(data)

    return say


def shakes_hands(hello: bytes, worker: str = "z") -> Stranger:
    """Returns a stranger with a worker's certificate, by default of a worker outside the cluster."""

    def shake(connection: socket.socket, authority: Authority) -> None:
        own = authority.identity(Principal(worker))
        tls = TlsSettings(own.ca, own.pair.certificate, own.pair.private_key, Principal("a").host(own.cluster), False)
        with suppress(ConnectionError):
            connection.sendall(hello)
        with pytest.raises(LinkError):
            Link(os.dup(connection.fileno()), "worker a", tls, UNKNOWN, UNKNOWN, 20.0)

    return shake


STRANGERS: dict[str, tuple[int, Stranger]] = {
    "plain text": (40, says(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 9)),
    "a certificate without a hello": (10, shakes_hands(b"")),
    "a certificate of another worker, for another group": (10, shakes_hands(UNKNOWN)),
    "a certificate of a member, for another group": (10, shakes_hands(UNKNOWN, "b")),
    "another group": (40, says(UNKNOWN + b"\x16\x03\x01")),
    "a part of a hello": (100, says(UNKNOWN[:17])),
    "garbage before a hello": (40, says(random.Random(SEED).randbytes(99) + UNKNOWN)),
    "a huge hello": (10, says(UNKNOWN[:8] * (1 << 20))),
    "1,000 silent connections": (1000, says(b"")),
    "1,000 connections for another group": (1000, says(UNKNOWN)),
}


@pytest.mark.parametrize("who", STRANGERS)
def test_strangers_change_nothing(who: str, attacked: Attacked) -> None:
    print(f"seed {SEED}")
    count, stranger = STRANGERS[who]
    cluster, began_s = attacked.cluster, time.monotonic()
    before, descriptors, told = cluster.answer(), attacked.descriptors(), attacked.told()
    pids = cluster.worker_pids
    with ThreadPoolExecutor(1) as pool, ExitStack() as open_ones:
        answer = pool.submit(cluster.answer, max_tokens=60)
        for number in range(count):
            port = attacked.ports[MEMBERS[number % 2]]
            connection = socket.create_connection(("127.0.0.1", port), timeout=20)
            stranger(open_ones.enter_context(connection), attacked.authority)
            if number % 100 == 99:
                open_ones.pop_all().close()
        assert cluster.answer() == before, "while connections are open"
        during = answer.result()
    assert cluster.answer(max_tokens=60) == during
    eventually(lambda: attacked.descriptors() <= descriptors, 60.0, f"{attacked.descriptors()}, before {descriptors}")
    assert cluster.worker_pids == pids and {worker["state"] for worker in cluster.status["workers"]} == {"ready"}
    seconds = time.monotonic() - began_s
    assert attacked.told() - told <= len(MEMBERS) * (seconds + 1)
