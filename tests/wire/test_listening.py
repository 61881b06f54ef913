"""Listeners at one address and at all of them."""

from __future__ import annotations

import socket

import pytest

from llamaclust.core.errors import UsageError
from llamaclust.wire.listening import listener, listening_host


@pytest.mark.parametrize(
    ("host", "reached", "shown"),
    [
        ("0.0.0.0", ["127.0.0.1", "127.0.0.2", "::1"], "0.0.0.0"),
        ("::", ["127.0.0.1", "127.0.0.2", "::1"], "0.0.0.0"),
        ("::1", ["::1"], "::1"),
        ("127.0.0.2", ["127.0.0.2"], "127.0.0.2"),
    ],
)
def test_a_listener_at_all_addresses_takes_both_families(host: str, reached: list[str], shown: str) -> None:
    with listener(host, 0, "") as opened:
        port = opened.getsockname()[1]
        for each in ("127.0.0.1", "127.0.0.2", "::1"):
            with socket.socket(socket.AF_INET6 if ":" in each else socket.AF_INET) as client:
                assert (client.connect_ex((each, port)) == 0) == (each in reached), each
        assert listening_host(opened) == shown
        with pytest.raises(UsageError, match=f"cannot listen on {host} port {port}: Address already in use; choose"):
            listener(host, port, "choose another")
