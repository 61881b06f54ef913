"""Tests of the command that `up` prints for other machines: with container bridges, two networks, or only IPv6. Answers
have the bits of one worker."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.clusters.command_line import CommandLine, Running, command_line
from support.network.box import Box
from support.network.distant_cluster import COORDINATOR, SPEED, TOKENS, Answer, DistantCluster, eight

GENERATIONS = eight(TOKENS)
WORKERS = ("a", "b")
ADVICE_WITHOUT_MULTICAST = "where multicast fails"


def containers(box: Box) -> None:
    """Adds a Docker bridge on each machine, with the same address, before eth0 in the list of interfaces."""
    for name in box.hosts:
        box.configure(name, "link add docker0 index 99 type bridge", "addr add 172.17.0.1/16 dev docker0")
        box.configure(name, "link set docker0 up", "link set eth0 down")
        box.configure(name, "link set eth0 up")


def ipv6_alone(box: Box) -> None:
    for number, name in enumerate(box.hosts, 1):
        box.configure(name, "addr flush dev eth0", f"addr add fd77::{number}/64 dev eth0 nodad")


def two_networks(box: Box) -> None:
    """Connects the coordinator to two networks. Each worker is in one of them."""
    box.add_device(COORDINATOR, "eth1")
    box.configure(COORDINATOR, "link set eth1 up", "addr add 10.78.0.1/24 dev eth1")
    box.configure("b", "addr flush dev eth0", "addr add 10.78.0.3/24 dev eth0")
    box.configure("b", "route add 10.77.0.0/24 via 10.78.0.1")
    box.configure("a", "route add 10.78.0.0/24 via 10.77.0.1")
    box[COORDINATOR].command("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")


PLACES: dict[str, Callable[[Box], None]] = {
    "containers": containers,
    "IPv6 alone": ipv6_alone,
    "two networks": two_networks,
}


def printed(line: CommandLine, coordinator: Running) -> list[list[str]]:
    """Returns the words of the printed commands after `llamaclust`: the main command, and the one without multicast if
    it is printed."""
    coordinator.says("add --device cuda:0")
    text = coordinator.err.read_text()
    found = re.search(r"^  llamaclust (worker .*)$", text, re.MULTILINE)
    assert found is not None, text
    commands = [found[1]]
    if ADVICE_WITHOUT_MULTICAST in text:
        joins = re.search(rf"{ADVICE_WITHOUT_MULTICAST}, use (.*) instead of --discover", text)
        assert joins is not None, text
        commands.append(found[1].replace("--discover", joins[1]))
    token = str(line.state_dir / ".trust" / "token")
    return [command.replace("FILE", token).split() for command in commands]


@contextmanager
def typed(box: Box, model: Path, *, discover: bool, which: int = 0) -> Iterator[DistantCluster]:
    """Runs a cluster with default addresses, and starts its workers with a printed command."""
    with command_line() as line, ThreadPoolExecutor() as asking:
        workers = [{"name": name, **SPEED} for name in WORKERS]
        plan = [{"worker": "a", "layers": [0, 3]}, {"worker": "b", "layers": [3, 6]}]
        keys: dict[str, Any] = {"launcher": "static", "listen": "127.0.0.1:8080", "workers": workers, "plan": plan}
        keys |= {"context_length": 512, "prefix_cache": False, "join": {"discover": discover}}
        file = line.cluster_file(model, "distant", **keys)
        coordinator = line.start("up", file, network=box[COORDINATOR].namespace)
        try:
            words = printed(line, coordinator)[which]
            running = {name: start(box, line, words, name) for name in WORKERS}
            coordinator.says("distant is ready")
            yield DistantCluster(box, line, coordinator, running, asking)
        finally:
            line.end_commands()


def start(box: Box, line: CommandLine, words: Sequence[str], name: str) -> Running:
    own = [word.replace("NAME", name) for word in words]
    return line.start(*own, "--threads", "1", network=box[name].namespace)


@pytest.mark.parametrize("discover", [False, True], ids=["join", "discover"])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_the_printed_command_works(
    small_model: Path, small_answers: list[Answer], place: Callable[[Box], None], discover: bool
) -> None:
    with Box((COORDINATOR, *WORKERS)) as box:
        place(box)
        with typed(box, small_model, discover=discover) as cluster:
            assert cluster.answers(GENERATIONS) == small_answers


def test_the_command_for_networks_without_multicast_works(small_model: Path, small_answers: list[Answer]) -> None:
    with Box((COORDINATOR, *WORKERS)) as box:
        ipv6_alone(box)
        with typed(box, small_model, discover=True, which=1) as cluster:
            assert cluster.answers(GENERATIONS) == small_answers


def test_a_coordinator_that_listens_at_all_addresses_of_ipv6(small_model: Path, small_answers: list[Answer]) -> None:
    """`[::]` takes connections of IPv4 as well."""
    with Box((COORDINATOR, *WORKERS)) as box, command_line() as line:
        keys: dict[str, Any] = {
            "launcher": "static",
            "listen": "127.0.0.1:8080",
            "workers": [{"name": n, **SPEED} for n in WORKERS],
        }
        join = {"listen": "[::]:7100", "members": "[::]:7101"}
        coordinator = line.start(
            "up", line.cluster_file(small_model, "distant", join=join, **keys), network=box[COORDINATOR].namespace
        )
        words = printed(line, coordinator)[0]
        assert words[1:3] == ["--join", f"{box[COORDINATOR].address}:7100"]
        for name in WORKERS:
            start(box, line, words, name)
        coordinator.says("distant is ready")
        line.end_commands()
