"""Tests of emulated links: delay, rate, loss, one-way black holes and unplugged cables, and their end."""

from __future__ import annotations

import socket
import time

import pytest

from support.network.box import Box
from support.network.conversation import conversation, hears
from support.network.link import Link, queue_commands

RETRANSMISSION_S = 20.0  # TCP sends again within this time, after a silence of about a second.


@pytest.mark.alone
@pytest.mark.parametrize(("round_trip_ms", "trips", "slack_ms"), [(0.5, 300, 0.4), (20.0, 15, 5.0), (100.0, 5, 5.0)])
def test_a_delay(delaying: Box, round_trip_ms: float, trips: int, slack_ms: float) -> None:
    with conversation(delaying["a"], delaying["b"]) as talk:
        assert talk.round_trip_ms(100) < 0.4
        delaying.set_link(Link.of_round_trip(round_trip_ms / 1e3))
        measured = talk.round_trip_ms(trips)
        assert 0.95 * round_trip_ms <= measured <= round_trip_ms + slack_ms
        delaying.set_link(Link())
        assert talk.round_trip_ms(100) < 0.4


@pytest.mark.alone
def test_one_host_s_link_alone(delaying: Box) -> None:
    delaying.set_link(Link(delay_s=0.03), "b")
    with conversation(delaying["a"], delaying["b"]) as talk:
        assert 29.0 <= talk.round_trip_ms(5) <= 45.0


@pytest.mark.alone
def test_without_delays_the_way_is_short() -> None:
    with Box(["a", "b"]) as box, conversation(box["a"], box["b"]) as talk:
        assert talk.round_trip_ms(200) < 0.3
        assert talk.megabits_per_second(64 << 20) > 1000


@pytest.mark.alone
def test_a_rate(box: Box) -> None:
    with conversation(box["a"], box["b"]) as talk:
        assert talk.megabits_per_second(16 << 20) > 500
        box.set_link(Link(rate_bit_s=100_000_000))
        assert 85 < talk.megabits_per_second(6 << 20) < 108
        box.set_link(Link())
        assert talk.megabits_per_second(16 << 20) > 500


@pytest.mark.alone
def test_a_rate_beside_a_delay(delaying: Box) -> None:
    delaying.set_link(Link.of_round_trip(0.02, rate_bit_s=100_000_000))
    with conversation(delaying["a"], delaying["b"]) as talk:
        assert 19.5 <= talk.round_trip_ms(10) <= 30.0
        assert 60 < talk.megabits_per_second(6 << 20) < 108


def test_a_loss_of_one_percent(box: Box) -> None:
    """200 of 20,000 datagrams are expected to be lost, with a standard deviation of 14."""
    count = 20_000
    with (
        box["b"].call(lambda: _datagrams(box["b"].address)) as receiver,
        box["a"].call(lambda: _datagrams(box["a"].address)) as sender,
    ):
        assert _arrive(sender, receiver, 1000) == 1000
        box.set_link(Link(loss=0.01))
        arrived = _arrive(sender, receiver, count)
        assert 120 < count - arrived < 280
        box.set_link(Link())
        assert _arrive(sender, receiver, 1000) == 1000


def _datagrams(address: str) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.bind((address, 5000))
    return made


def _arrive(sender: socket.socket, receiver: socket.socket, count: int) -> int:
    """Returns the number of datagrams that arrive. They are sent in small bursts, so that no queue overflows."""
    target = receiver.getsockname()
    arrived = 0
    for burst in range(count // 20):
        for _ in range(20):
            sender.sendto(b"x", target)
        end = str(burst).encode()
        sender.sendto(end, target)
        while (heard := hears(receiver, 0.1)) != end:
            if heard is None:
                sender.sendto(end, target)  # The last datagram of the burst was lost.
            arrived += heard == b"x"
    return arrived


@pytest.mark.parametrize(("source", "target"), ["ab", "ba"])
def test_a_black_hole_stalls_one_way_without_a_word(box: Box, source: str, target: str) -> None:
    with conversation(box["a"], box["b"]) as talk:
        ends = {"a": talk.caller, "b": talk.called}
        box.black_hole(source, target)
        ends[source].sendall(b"lost")
        ends[target].sendall(b"heard")
        assert hears(ends[source], RETRANSMISSION_S) == b"heard", "the other way is open"
        assert hears(ends[target], 1.0) is None, "nothing, not even the end of the connection"
        box.heal()
        assert hears(ends[target], RETRANSMISSION_S) == b"lost", "TCP delivers it as if nothing had been"


def test_a_new_connection_into_a_black_hole_hangs(box: Box) -> None:
    box.black_hole("b", "a")
    with box["b"].listen(5000):
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            box["a"].connect(box["b"], 5000, timeout_s=0.5)
        assert time.monotonic() - begun >= 0.5


def test_a_pulled_cable_stalls_and_heals(box: Box) -> None:
    with conversation(box["a"], box["b"]) as talk:
        box.unplug("b")
        talk.caller.sendall(b"late")
        assert hears(talk.called, 1.0) is None
        assert hears(talk.caller, 0.1) is None
        box.plug("b")
        assert hears(talk.called, RETRANSMISSION_S) == b"late"
        talk.called.sendall(b"answer")
        assert hears(talk.caller, RETRANSMISSION_S) == b"answer"


def test_where_the_kernel_has_netem_it_delays_and_the_rate_is_its_child() -> None:
    link = Link(0.01, 10**8)
    assert [" ".join(command) for command in queue_commands(link, "eth0", netem=True)] == [
        "qdisc add dev eth0 root handle 1: netem delay 10000us limit 100000",
        "qdisc add dev eth0 parent 1:1 tbf rate 100000000bit burst 128kb latency 50ms",
    ]
    assert [" ".join(command) for command in queue_commands(link, "eth0", netem=False)] == [
        "qdisc add dev eth0 root tbf rate 100000000bit burst 128kb latency 50ms"
    ]
