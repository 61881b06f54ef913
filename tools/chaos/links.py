"""The network links of workers, and nftables rules that disturb them. The rules match only the cluster's addresses."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from llamaclust.tools.chaos.processes import is_here

_UNIX = "unix:"
_PRIORITY = -310
"""Priority with which the rules run before connection tracking and before other programs' rules."""


class Disturbance(StrEnum):
    CUT = "drop"
    SLOW = "limit rate over 100 kbytes/second burst 100 kbytes drop"


@dataclass(frozen=True, slots=True)
class WorkerLink:
    """A worker's link to the cluster members on this machine."""

    hosts: frozenset[str]  # IP addresses of the worker.
    ports: frozenset[int]  # The worker's ports for stages and for links of groups.
    own_ports: frozenset[int] = frozenset()  # Ports of these members. Empty if the worker runs on this machine.

    def commands(self, table: str, label: str, disturbance: Disturbance, hold_s: float) -> str:
        """Returns nft commands that begin a disturbance, which the kernel ends after `hold_s` seconds."""
        lifetime = f"timeout {max(1, round(hold_s * 1000))}ms"
        lines = []
        for name, ports in (("port", self.ports), ("own", self.own_ports)):
            lines.append(f"add set {table} {label}_{name} {{ type inet_service; flags timeout; }}")
            lines += [f"add element {table} {label}_{name} {{ {port} {lifetime} }}" for port in sorted(ports)]
        for hook in ("input", "output"):
            lines.append(f"add chain {table} {label}_{hook} {{ type filter hook {hook} priority {_PRIORITY}; }}")
            for match in self._matches(hook, f"@{label}_port", f"@{label}_own"):
                lines.append(f"add rule {table} {label}_{hook} {match} {disturbance}")
        return "\n".join(lines)

    @staticmethod
    def end_commands(table: str, label: str) -> str:
        chains = [f"delete chain {table} {label}_{hook}" for hook in ("input", "output")]
        return "\n".join([*chains, *(f"delete set {table} {label}_{name}" for name in ("port", "own"))])

    def _matches(self, hook: str, port: str, own: str) -> Iterator[str]:
        for host in sorted(self.hosts):
            family = "ip6" if ":" in host else "ip"
            if not self.own_ports:  # Within this machine, packets of both directions pass the hook `input`.
                if hook == "input":
                    yield f"{family} daddr {host} tcp dport {port}"
                    yield f"{family} saddr {host} tcp sport {port}"
            elif hook == "input":
                yield f"{family} saddr {host} tcp sport {port}"
                yield f"{family} saddr {host} tcp dport {own}"
            else:
                yield f"{family} daddr {host} tcp dport {port}"
                yield f"{family} daddr {host} tcp sport {own}"


def worker_links(addresses: Mapping[str, Sequence[str]], coordinator_ports: frozenset[int]) -> dict[str, WorkerLink]:
    in_network = {name: [each for each in own if not each.startswith(_UNIX)] for name, own in addresses.items()}
    found = {name: _resolve(own) for name, own in in_network.items()}
    known = {name: link for name, link in found.items() if link.hosts and coordinator_ports}
    here = {name for name, link in known.items() if any(map(is_here, link.hosts))}
    own_ports = coordinator_ports.union(*(known[name].ports for name in here))
    return {
        name: link if name in here else WorkerLink(link.hosts, link.ports, own_ports) for name, link in known.items()
    }


def _resolve(addresses: Sequence[str]) -> WorkerLink:
    hosts, ports = set[str](), set[int]()
    for host, _, port in (address.rpartition(":") for address in addresses):
        ports.add(int(port))
        with suppress(OSError):
            found: list[Any] = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
            hosts |= {entry[4][0].partition("%")[0] for entry in found}
    return WorkerLink(frozenset(hosts), frozenset(ports))
