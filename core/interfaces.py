"""The network addresses of this machine."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llamaclust.core.addresses import ANYWHERE, is_link_local, is_loopback

_IPV6_ADDRESSES = Path("/proc/thread-self/net/if_inet6")
_PASSING = 0x01 | 0x08 | 0x20 | 0x40
"""Flags of IPv6 addresses that do not last: temporary, duplicate, deprecated, tentative (Linux, if_addr.h)."""
_ELSEWHERE = (("192.0.2.1", socket.AF_INET), ("2001:db8::1", socket.AF_INET6))
"""Documentation addresses (RFC 5737, RFC 3849). No machine has them, so the route to them is the default route."""
_ADDR_PREFERENCES, _PREFER_PUBLIC = 72, 0x2
"""IPV6_ADDR_PREFERENCES and IPV6_PREFER_SRC_PUBLIC (Linux, RFC 5014)."""
_VIRTUAL = re.compile(
    r"(docker|podman|virbr|lxcbr|lxdbr|incusbr|vnet|veth|cni|flannel|cali|vxlan|kube|tun|tap|utun|wg|tailscale|zt"
    r"|nebula|ipsec|gre|sit|ip6tnl|vmnet|vboxnet|dummy)[0-9a-z._-]*|br-[0-9a-f]{12}"
)
"""Interface names of container bridges and tunnels, through which other machines cannot reach this machine."""


@dataclass(frozen=True, slots=True)
class InterfaceAddress:
    interface: str
    host: str
    is_default: bool = False  # True if the default route sends from this address.

    @property
    def is_virtual(self) -> bool:
        return _VIRTUAL.fullmatch(self.interface) is not None

    @property
    def rank(self) -> tuple[bool, bool, bool, bool]:
        """A key for sorting. An address that other machines are more likely to reach has a smaller key."""
        return is_loopback(self.host), self.is_virtual, not self.is_default, ":" in self.host


def interface_addresses() -> list[InterfaceAddress]:
    """Returns this machine's addresses, sorted by `rank`, without link-local (fe80::/10) and temporary addresses."""
    default, passing = {source_host(host, family) for host, family in _ELSEWHERE}, _passing_hosts()
    try:
        listed = _listed_addresses()
    except OSError:  # A sandbox without AF_NETLINK does not list interfaces.
        listed = [("default", host) for host in default if host is not None] + [("lo", "127.0.0.1")]
    found = [
        InterfaceAddress(interface, host, host in default)
        for interface, host in listed
        if not is_link_local(host) and host not in passing
    ]
    return sorted(found, key=lambda address: address.rank)


def _listed_addresses() -> list[tuple[str, str]]:
    """Returns (interface name, host) of each address. Raises OSError if the system does not list interfaces."""
    import ifaddr  # Imported here because the import takes as long as a whole command.

    return [
        (adapter.name, each.ip if isinstance(each.ip, str) else each.ip[0])
        for adapter in sorted(ifaddr.get_adapters(), key=lambda adapter: adapter.index or 0)
        for each in adapter.ips
    ]


def own_addresses() -> list[str]:
    return list(dict.fromkeys(address.host for address in interface_addresses()))


def network_addresses() -> list[str]:
    """Returns the addresses of physical interfaces, or else of virtual interfaces, or else loopback addresses."""
    return list(dict.fromkeys(address.host for address in _of_networks(interface_addresses())))


def one_of_each_interface() -> list[str]:
    by_interface: dict[str, str] = {}
    for address in _of_networks(interface_addresses()):
        by_interface.setdefault(address.interface, address.host)
    return list(by_interface.values())


def _of_networks(addresses: list[InterfaceAddress]) -> list[InterfaceAddress]:
    best = addresses[0].rank[:2] if addresses else None
    return [address for address in addresses if address.rank[:2] == best]


def reachable_host(host: str) -> str:
    """Returns the host at which clients reach a listener on `host`. A wildcard becomes this machine's best address."""
    return next(iter(own_addresses()), host) if host in ANYWHERE else host


def source_host(host: str, family: socket.AddressFamily, port: int = 9) -> str | None:
    """Returns the source address of packets from this machine to a host, or None if there is no route."""
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        if family == socket.AF_INET6:
            with suppress(OSError):  # Only Linux has this option.
                probe.setsockopt(socket.IPPROTO_IPV6, _ADDR_PREFERENCES, _PREFER_PUBLIC)
        probe.connect((host, port))  # Connecting a UDP socket sends nothing.
        return str(probe.getsockname()[0])
    return None


def _passing_hosts() -> set[str]:
    return {host for host, flags in _ipv6_flags() if flags & _PASSING}


def _ipv6_flags() -> Iterator[tuple[str, int]]:
    with suppress(OSError):
        for line in _IPV6_ADDRESSES.read_text().splitlines():
            digits, _, _, _, flags, _ = line.split()
            yield socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)), int(flags, 16)
