"""Tests of the measured throughput of a link, which does not change if other programs delay single messages."""

from __future__ import annotations

from typing import Any

import pytest

from llamaclust.wire.rpc import link_probe
from llamaclust.wire.rpc.methods import PROBE_BYTES

ROUND_TRIP_S = 0.01


class TimedStream:
    """A link with its own clock. `delays` has additional seconds by number of the transfer."""

    def __init__(self, bytes_s: float, delays: dict[int, float]) -> None:
        self.now_s = 0.0
        self.sent: list[int] = []
        self._bytes_s, self._delays = bytes_s, delays
        self._size = 0

    async def write(self, frame: bytes) -> None:
        self._size += len(frame)

    async def read(self) -> bytes:
        if self._size:  # The first answer comes after all frames.
            self.now_s += ROUND_TRIP_S + self._size / self._bytes_s + self._delays.get(len(self.sent), 0.0)
            self.sent.append(self._size)
            self._size = 0
        return b"here"


async def measured(monkeypatch: pytest.MonkeyPatch, stream: TimedStream) -> float:
    with monkeypatch.context() as patch:
        patch.setattr(link_probe, "perf_counter", lambda: stream.now_s)
        untyped: Any = stream
        return await link_probe._throughput(untyped, ROUND_TRIP_S)


@pytest.mark.parametrize("bytes_s", [1e5, 1e6, 12.5e6, 125e6, 2e9])
@pytest.mark.parametrize("delayed", [(), (0,), (1,), (0, 2), (4, 5)])
async def test_a_delay_changes_no_throughput(
    monkeypatch: pytest.MonkeyPatch, bytes_s: float, delayed: tuple[int, ...]
) -> None:
    stream = TimedStream(bytes_s, dict.fromkeys(delayed, 0.15))
    assert await measured(monkeypatch, stream) == pytest.approx(bytes_s, rel=1e-6)


@pytest.mark.parametrize("bytes_s", [1e5, 12.5e6, 2e9])
async def test_a_long_pause_at_the_start_changes_no_throughput(monkeypatch: pytest.MonkeyPatch, bytes_s: float) -> None:
    stream = TimedStream(bytes_s, {0: 1.2})
    assert await measured(monkeypatch, stream) == pytest.approx(bytes_s, rel=1e-6)


async def test_a_slow_link_is_tried_for_a_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = TimedStream(7e3, {})  # 64 KiB take 9 s over a modem. The limit for the whole measurement is 20 s.
    assert await measured(monkeypatch, stream) == pytest.approx(7e3)
    assert stream.sent == [1 << 16]


async def test_all_transfers_are_within_the_bound_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = TimedStream(300e6, dict.fromkeys(range(40), 0.15) | dict.fromkeys(range(2, 40, 3), 0.0))
    await measured(monkeypatch, stream)
    assert stream.sent[-1] == link_probe._MOST_BYTES
    messages = sum(-(-size // PROBE_BYTES) for size in stream.sent)
    assert messages + link_probe._WARM_UP + link_probe._PINGS < link_probe.MOST_MESSAGES
