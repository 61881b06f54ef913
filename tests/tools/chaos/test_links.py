"""Tests of the firewall rules that match the packets of a worker's link."""

from __future__ import annotations

import socket

import pytest

from llamaclust.tools.chaos.links import Disturbance, WorkerLink, worker_links

NOT_HERE = "192.0.2.7"  # an address reserved for documentation
TABLE = "inet t"


def matches(commands: str) -> list[str]:
    """Returns the matches of the rules in nft commands, with their hooks."""
    rules = [line.removeprefix(f"add rule {TABLE} f1_") for line in commands.splitlines() if "add rule" in line]
    return [rule.replace("@f1_", "").removesuffix(" drop") for rule in rules]


def test_of_another_machine_only_the_members_ports_are_cut() -> None:
    """Checks the ports of stages and of group links."""
    addresses = {
        "a": [f"{NOT_HERE}:7102", f"{NOT_HERE}:8102"],
        "b": ["127.0.0.1:7103", "127.0.0.1:8103"],
        "c": ["unix:/run/c.sock", "unix:/run/c.sock.l"],
    }
    links = worker_links(addresses, frozenset({7100, 7101}))
    assert links == {
        "a": WorkerLink(frozenset({NOT_HERE}), frozenset({7102, 8102}), frozenset({7100, 7101, 7103, 8103})),
        "b": WorkerLink(frozenset({"127.0.0.1"}), frozenset({7103, 8103})),
    }
    commands = links["a"].commands(TABLE, "f1", Disturbance.CUT, 2.5)
    assert matches(commands) == [
        f"input ip saddr {NOT_HERE} tcp sport port",
        f"input ip saddr {NOT_HERE} tcp dport own",
        f"output ip daddr {NOT_HERE} tcp dport port",
        f"output ip daddr {NOT_HERE} tcp sport own",
    ]
    ports = [f"port {{ {port} timeout 2500ms }}" for port in (7102, 8102)]
    ports += [f"own {{ {port} timeout 2500ms }}" for port in (7100, 7101, 7103, 8103)]
    assert [line.partition("f1_")[2] for line in commands.splitlines() if "add element" in line] == ports


def test_on_this_machine_packets_are_dropped_once() -> None:
    link = WorkerLink(frozenset({"::1"}), frozenset({7103}))
    assert matches(link.commands(TABLE, "f1", Disturbance.CUT, 1.0)) == [
        "input ip6 daddr ::1 tcp dport port",
        "input ip6 saddr ::1 tcp sport port",
    ]
    assert "limit rate over 100 kbytes/second" in link.commands(TABLE, "f1", Disturbance.SLOW, 1.0)


def test_names_that_do_not_resolve_and_clusters_without_ports_have_no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    address = {"a": ["[2001:db8::1]:7102"]}
    assert worker_links(address, frozenset({7100})) == {
        "a": WorkerLink(frozenset({"2001:db8::1"}), frozenset({7102}), frozenset({7100}))
    }
    assert worker_links(address, frozenset()) == {}

    def unknown(*arguments: object, **keys: object) -> None:
        raise socket.gaierror("unknown")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert worker_links(address, frozenset({7100})) == {}
