"""Tests of the order of this machine's addresses: addresses that other machines can reach come first."""

from __future__ import annotations

from pathlib import Path

import ifaddr
import pytest

from llamaclust.core import interfaces
from llamaclust.core.addresses import bounded_host
from llamaclust.core.interfaces import network_addresses, one_of_each_interface, own_addresses, reachable_host

LOOPBACK = ("lo", "127.0.0.1", "::1")


def use(monkeypatch: pytest.MonkeyPatch, *listed: tuple[str, ...], default: tuple[str, ...] = ()) -> None:
    """Replaces the system's interfaces by `listed` (name and addresses). `default` has the addresses of default
    routes."""
    adapters = []
    for number, (name, *hosts) in enumerate(listed, 1):
        ips = [ifaddr.IP((host, 0, 0) if ":" in host else host, 24, name) for host in hosts]
        adapters.append(ifaddr.Adapter(name, name, ips, number))
    monkeypatch.setattr(ifaddr, "get_adapters", lambda: adapters)
    by_family = {":" in host: host for host in default}
    monkeypatch.setattr(interfaces, "source_host", lambda host, family: by_family.get(":" in host))
    monkeypatch.setattr(interfaces, "_IPV6_ADDRESSES", Path("/nowhere"))


@pytest.mark.parametrize(
    "virtual", ["docker0", "br-0123456789ab", "virbr0", "vethab12", "tun0", "wg0", "tailscale0", "zt5u4y", "cni0"]
)
@pytest.mark.parametrize("has_default", [True, False])
def test_bridges_and_tunnels_come_last(monkeypatch: pytest.MonkeyPatch, virtual: str, has_default: bool) -> None:
    default = ("192.168.1.5",) if has_default else ("172.17.0.1",)  # A tunnel may be the default route.
    use(monkeypatch, LOOPBACK, (virtual, "172.17.0.1"), ("eno1", "192.168.1.5"), default=default)
    assert own_addresses() == ["192.168.1.5", "172.17.0.1", "127.0.0.1", "::1"]
    assert network_addresses() == one_of_each_interface() == ["192.168.1.5"]


def test_the_default_route_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, LOOPBACK, ("eth0", "10.0.0.1"), ("br0", "192.168.1.5", "2001:db9::5"), default=("192.168.1.5",))
    assert network_addresses() == ["192.168.1.5", "10.0.0.1", "2001:db9::5"]
    assert one_of_each_interface() == ["192.168.1.5", "10.0.0.1"]
    assert reachable_host("0.0.0.0") == "192.168.1.5"


def test_ipv6_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, LOOPBACK, ("docker0", "172.17.0.1"), ("eth0", "fe80::1", "fd00::7"), default=("fd00::7",))
    assert one_of_each_interface() == ["fd00::7"]
    assert reachable_host("::") == reachable_host("0.0.0.0") == "fd00::7"
    assert reachable_host("10.1.2.3") == "10.1.2.3"


def test_a_sandbox_that_lists_no_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses of default routes and of loopback are known without AF_NETLINK."""

    def refuse() -> None:
        raise OSError(97, "Address family not supported by protocol")

    use(monkeypatch, default=("192.168.1.5",))
    monkeypatch.setattr(ifaddr, "get_adapters", refuse)
    assert own_addresses() == ["192.168.1.5", "127.0.0.1"]
    assert one_of_each_interface() == ["192.168.1.5"]
    use(monkeypatch)
    monkeypatch.setattr(ifaddr, "get_adapters", refuse)
    assert own_addresses() == one_of_each_interface() == ["127.0.0.1"]


def test_without_a_network_there_are_tunnels_or_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, LOOPBACK, ("wg0", "10.9.0.2"))
    assert network_addresses() == ["10.9.0.2"]
    use(monkeypatch, LOOPBACK)
    assert network_addresses() == ["127.0.0.1", "::1"]
    use(monkeypatch)
    assert network_addresses() == []
    assert reachable_host("0.0.0.0") == "0.0.0.0"


def test_addresses_that_the_system_replaces_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, ("eth0", "fd00::1", "fd00::2", "fd00::3", "fd00::4", "fd00::5"))
    flags = {1: 0x80, 2: 0x01, 3: 0x20, 4: 0x40, 5: 0x00}  # Permanent, temporary, deprecated, tentative, none.
    lines = [f"fd{'0' * 29}{last} 02 40 00 {flag:02x}     eth0" for last, flag in flags.items()]
    (tmp_path / "if_inet6").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(interfaces, "_IPV6_ADDRESSES", tmp_path / "if_inet6")
    assert own_addresses() == ["fd00::1", "fd00::5"]


@pytest.mark.parametrize(
    ("host", "bounded"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unix", "unix"),
    ],
)
def test_a_host_with_many_addresses_of_ipv6_counts_once(host: str, bounded: str) -> None:
    assert bounded_host(host) == bounded
