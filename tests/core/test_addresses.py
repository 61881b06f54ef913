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


@pytest.mark.parametrize("text", ["[fe80::1%]:1", "[fe80::1%a b]:1", "[fe80::1%" + "x" * 40 + "]:1", "fe80::1%eth0:1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(AddressError, match="is not an address; write it like"):
        split_address(text)
