"""Tests of listeners at one address and at all addresses."""

from __future__ import annotations

import socket

import pytest

from llamaclust.core.addresses import ANYWHERE
from llamaclust.core.errors import LlamaclustError, UsageError
from llamaclust.wire.listening import listener, listening_host
from support.network.loopback import free_port, has_ipv6_loopback

HERE = ("127.0.0.1", "127.0.0.2", *(["::1"] if has_ipv6_loopback() else []))
needs_ipv6 = pytest.mark.skipif(not has_ipv6_loopback(), reason="this machine has no ::1")


@pytest.mark.parametrize(
    ("host", "reached", "shown"),
    [
        ("0.0.0.0", HERE, "0.0.0.0"),
        ("::", HERE, "0.0.0.0"),
        pytest.param("::1", ("::1",), "::1", marks=needs_ipv6),
        ("127.0.0.2", ("127.0.0.2",), "127.0.0.2"),
    ],
)
def test_a_listener_at_all_addresses_takes_both_families(host: str, reached: tuple[str, ...], shown: str) -> None:
    with listener(host, 0 if host in ANYWHERE else free_port(), "") as opened:
        port = opened.getsockname()[1]
        for each in HERE:
            with socket.socket(socket.AF_INET6 if ":" in each else socket.AF_INET) as client:
                assert (client.connect_ex((each, port)) == 0) == (each in reached), each
        assert listening_host(opened) == shown
        with pytest.raises(UsageError, match=f"cannot listen on {host} port {port}: Address already in use; choose"):
            listener(host, port, "choose another")


def test_an_address_that_this_machine_may_get_later_is_no_wrong_usage() -> None:
    """Systemd does not start the coordinator again after the exit code of wrong usage."""
    with pytest.raises(LlamaclustError, match=r"203\.0\.113\.9 port 1: Cannot assign requested address") as late:
        listener("203.0.113.9", 1, "choose another")
    assert late.value.exit_code == 1
