"""Names of coordinators: those that are not found, and those whose addresses are of one link."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from llamaclust.core.errors import WorkerError
from llamaclust.worker.own_address import Route

LINK = (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("fe80::7%eth0", 7100, 0, 2))
UNIQUE = (socket.AF_INET6, socket.SOCK_DGRAM, 17, "", ("fd00::7", 7100, 0, 0))
IPV4 = (socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("192.168.1.7", 7100))


def resolve_to(monkeypatch: pytest.MonkeyPatch, *found: Any) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **more: list(found))


@pytest.mark.parametrize(
    ("found", "host"),
    [((LINK, UNIQUE, IPV4), "fd00::7"), ((LINK, IPV4), "192.168.1.7"), ((IPV4, LINK), "192.168.1.7")],
)
async def test_an_address_that_other_machines_can_use_is_chosen(
    monkeypatch: pytest.MonkeyPatch, found: Any, host: str
) -> None:
    resolve_to(monkeypatch, *found)
    assert (await Route.to("laptop.local", 7100)).host == host


async def test_a_name_with_addresses_of_one_link_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    resolve_to(monkeypatch, LINK, LINK)
    with pytest.raises(WorkerError, match=r"laptop\.local has only addresses of one link, .*: give a host name"):
        await Route.to("laptop.local", 7100)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (socket.EAI_NONAME, "Name or service not known"),
        (socket.EAI_AGAIN, "Temporary failure in name resolution"),
        (socket.EAI_FAIL, "Non-recoverable failure in name resolution"),
    ],
)
async def test_a_name_that_is_not_found(monkeypatch: pytest.MonkeyPatch, code: int, reason: str) -> None:
    def fail(*given: object, **more: object) -> None:
        raise socket.gaierror(code, reason)

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(WorkerError, match=f"^laptopp is not found: {reason}; check the name, or give an address"):
        await Route.to("laptopp", 7100)
