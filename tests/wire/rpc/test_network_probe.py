"""Tests of the network's measured round trip: no program is needed at the other end, and no answer gives no result."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from llamaclust.wire.rpc import network_probe
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


@pytest.mark.parametrize(("each_s", "connections"), [(0.0, 8), (0.7, 3), (1.0, 2), (5.0, 1)])
async def test_all_connections_together_have_one_deadline(
    each_s: float, connections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s: list[float] = [0.0]
    most: list[float] = []

    def connecting_s(family: int, place: object, most_s: float) -> float:
        most.append(most_s)
        now_s[0] += each_s
        return each_s

    monkeypatch.setattr(network_probe, "perf_counter", lambda: now_s[0])
    monkeypatch.setattr(network_probe, "_connecting_s", connecting_s)
    assert await network_round_trip("127.0.0.1:1") == each_s
    assert most == pytest.approx([2.0 - each_s * number for number in range(connections)])


async def test_the_first_refusal_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []

    def refused(family: int, place: object, most_s: float) -> float:
        tried.append(most_s)
        if len(tried) == 2:
            raise ConnectionRefusedError
        return 0.5

    monkeypatch.setattr(network_probe, "_connecting_s", refused)
    assert await network_round_trip("127.0.0.1:1") == 0.5
    assert len(tried) == 2


async def test_a_name_that_is_not_resolved_in_time_is_no_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = threading.Event()
    monkeypatch.setattr(network_probe, "_MOST_S", 0.05)
    monkeypatch.setattr(network_probe, "_resolved", lambda _: ends.wait())
    try:
        assert await network_round_trip("slow.invalid:7000") is None
    finally:
        ends.set()
