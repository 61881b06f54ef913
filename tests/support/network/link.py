"""The properties of a host's link, and the commands that set them."""

from __future__ import annotations

from dataclasses import dataclass

_BURST = "128kb"
_QUEUE = "50ms"  # a packet that would wait longer is dropped
_NETEM_PACKETS = "100000"


@dataclass(frozen=True, slots=True)
class Link:
    """Delay and rate of packets that a host sends, and loss of packets that it receives. Between two equal hosts the
    round trip is twice the delay."""

    delay_s: float = 0.0
    rate_bit_s: int | None = None
    loss: float = 0.0  # share of packets

    @classmethod
    def of_round_trip(cls, round_trip_s: float, rate_bit_s: int | None = None, loss: float = 0.0) -> Link:
        """Returns the link that gives this round trip if all hosts have it."""
        return cls(round_trip_s / 2, rate_bit_s, loss)


def queue_commands(link: Link, device: str, *, netem: bool) -> list[list[str]]:
    """Returns arguments of `tc` for a device without a queue of its own. Without netem, `emulator` adds the delay."""
    add = ["qdisc", "add", "dev", device]
    delayed = netem and link.delay_s > 0
    commands = []
    if delayed:
        delay = f"{link.delay_s * 1e6:.0f}us"
        commands.append([*add, "root", "handle", "1:", "netem", "delay", delay, "limit", _NETEM_PACKETS])
    if link.rate_bit_s is not None:
        parent = ["parent", "1:1"] if delayed else ["root"]
        shape = ["tbf", "rate", f"{link.rate_bit_s}bit", "burst", _BURST, "latency", _QUEUE]
        commands.append([*add, *parent, *shape])
    return commands


def loss_rule(loss: float) -> list[str]:
    """Returns `iptables` arguments that drop a share of incoming packets, except those of the host to itself."""
    chance = ["-m", "statistic", "--mode", "random", "--probability", f"{loss:.6f}"]
    return ["INPUT", "!", "-i", "lo", *chance, "-j", "DROP"]


def drop_rule(source: str) -> list[str]:
    """Returns `iptables` arguments that drop packets from this address silently."""
    return ["INPUT", "-s", source, "-j", "DROP"]


def port_rule(port: int, *, refuses: bool) -> list[str]:
    """Returns `iptables` arguments that reset TCP connections to this port, or drop their packets silently."""
    target = ("REJECT", "--reject-with", "tcp-reset") if refuses else ("DROP",)
    return ["INPUT", "-p", "tcp", "--dport", str(port), "-j", *target]


def refuse_rule(source: str) -> list[str]:
    """Returns `iptables` arguments that reset TCP connections from this address."""
    return ["INPUT", "-s", source, "-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset"]
