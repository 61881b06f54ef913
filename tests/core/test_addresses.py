"""Tests of addresses that users write."""

from __future__ import annotations

import pytest

from llamaclust.core.addresses import AddressError, is_link_local, joined_address, split_address


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("fe80::1", True),
        ("fe80::1%eth0", True),
        ("febf::1%wlp0s20f3", True),
        ("fe80::1%2", True),
        ("fec0::1", False),
        ("fd00::1", False),
        ("169.254.1.1", False),
        ("::1", False),
        ("laptop.local", False),
    ],
)
def test_addresses_of_one_link(host: str, expected: bool) -> None:
    assert is_link_local(host) == expected
    if expected:
        with pytest.raises(AddressError, match=f"{host} is a link-local address, .*; give a host name"):
            split_address(joined_address(host, 7100))
    else:
        assert split_address(joined_address(host, 7100)) == (host, 7100)


SCOPED = ["[fe80::1%]:1", "[fe80::1%a b]:1", "[fe80::1%" + "x" * 40 + "]:1", "fe80::1%eth0:1"]
LONG = ".".join(["x" * 63] * 4)


@pytest.mark.parametrize(
    "text", [*SCOPED, "a..b:1", ".a:1", "a..:1", ".:1", ":1", f"{'x' * 64}:1", f"a.{'x' * 64}.b:1", f"{LONG}.x:1"]
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(AddressError, match="is not an address; write it like"):
        split_address(text)


@pytest.mark.parametrize("host", ["a", "a.", "x" * 63, "a-b_c.d", LONG, "127.0.0.1", "xn--bcher-kva.example."])
def test_names_can_be_looked_up(host: str) -> None:
    assert split_address(f"{host}:65535") == (host, 65535)
    host.encode("idna")  # The codec of `socket.getaddrinfo`.
