"""Checks that clients without a key are distinguished by host, and that an IPv6 /64 network counts as one host."""

from __future__ import annotations

import pytest
from starlette.types import Receive, Scope, Send

from llamaclust.cluster.front.http.gates import KeyGate
from llamaclust.cluster.front.settings import ApiSettings
from llamaclust.cluster.front.text.sharing import current_owner


@pytest.mark.parametrize(
    ("hosts", "owners"),
    [
        (["2001:db8::1", "2001:db8::ffff:1", "2001:db8:0:0:a::"], 1),
        (["2001:db8::1", "2001:db8:0:1::1"], 2),
        (["192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2"], 2),
        (["fe80::1%eth0", "fe80::2%eth0"], 1),
    ],
    ids=str,
)
async def test_a_host_is_one_owner_whatever_address_it_takes(hosts: list[str], owners: int) -> None:
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(current_owner.get())

    async def receive() -> dict[str, object]:
        raise AssertionError

    async def send(message: object) -> None:
        raise AssertionError

    gate = KeyGate(app, ApiSettings())
    for host in hosts:
        await gate(
            {"type": "http", "method": "POST", "path": "/tokenize", "headers": [], "client": (host, 5)}, receive, send
        )
    assert len(set(seen)) == owners and len(seen) == len(hosts)
