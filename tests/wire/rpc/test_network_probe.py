"""The network's round trip needs no program at the other end, and no answer is no round trip."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from llamaclust.wire.rpc.network_probe import network_round_trip


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
async def test_a_listener_that_accepts_nothing_is_measured(family: int, tmp_path: Path) -> None:
    with socket.socket(family) as listening:
        listening.bind(str(tmp_path / "own") if family == socket.AF_UNIX else ("127.0.0.1", 0))
        listening.listen(64)
        name = listening.getsockname()
        address = f"unix:{name}" if family == socket.AF_UNIX else f"{name[0]}:{name[1]}"
        found = await network_round_trip(address)
        assert found is not None and found > 0


@pytest.mark.parametrize("address", ["", "127.0.0.1:1", "unix:/nowhere", "no.such.host.invalid:7000"])
async def test_where_nothing_listens_nothing_is_known(address: str) -> None:
    assert await network_round_trip(address) is None
