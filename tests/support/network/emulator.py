"""A switch in user space that delays packets, for kernels without netem; it has a TUN device in each namespace.

    python emulator.py NAMESPACE=ADDRESS/BITS ...

creates a device `eth0` in every namespace, prints `up`, and forwards packets by destination address until its standard
input ends. An input line `ADDRESS SECONDS` sets the delay of packets from this address; its reply is `ok`.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import ipaddress
import os
import select
import struct
import sys
import time
from contextlib import suppress
from itertools import count

from support.network.namespaces import inside, run

_TUNSETIFF = 0x400454CA
_IFF_TUN_NO_PI = 0x1001
_MTU = "9000"  # jumbo frames for a fast network, since a packet of any length costs some 20 us here
_QUEUED = "5000"
_BURST = 32  # most packets of one host before those of others
_EARLY_NS = 60_000  # a timer may be late by this much, so the end of a wait is a busy loop
_OWN_NS = 20_000  # shortest time of a packet without a delay; it is subtracted from delays


class Timer:
    """A descriptor that becomes readable at a given time; epoll's timeouts are in milliseconds."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor: int = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        assert self.descriptor >= 0

    def set(self, at_ns: int) -> None:
        """Makes the descriptor unreadable until this time; it is readable at once if the time is past."""
        seconds, nanoseconds = divmod(max(at_ns, 1), 1_000_000_000)
        spec = struct.pack("4q", 0, 0, seconds, nanoseconds)
        self._libc.timerfd_settime(self.descriptor, 1, spec, None)  # 1: the time is absolute

    def clear(self) -> None:
        with suppress(BlockingIOError):
            os.read(self.descriptor, 8)


def open_tun(namespace: str, address: str) -> int:
    """Creates the device and returns its descriptor, which works outside the namespace."""

    def make() -> int:
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", b"eth0", _IFF_TUN_NO_PI))
        return tun

    tun = inside(namespace, make)
    run("ip", "-n", namespace, "addr", "add", address, "dev", "eth0")
    run("ip", "-n", namespace, "link", "set", "eth0", "mtu", _MTU, "txqueuelen", _QUEUED, "up")
    return tun


class Switch:
    def __init__(self, tuns: dict[bytes, int]) -> None:
        self._tuns = tuns
        self._delays_ns = dict.fromkeys(tuns.values(), 0)
        self._on_the_way: list[tuple[int, int, int, bytes]] = []  # due time, number, target, packet
        self._numbers = count()
        self._timer = Timer()
        self._poll = select.epoll()
        for descriptor in (*tuns.values(), self._timer.descriptor, sys.stdin.fileno()):
            self._poll.register(descriptor, select.EPOLLIN)

    def forward(self) -> None:
        """Forwards packets until standard input ends."""
        while True:
            self._deliver()
            for descriptor, _ in self._poll.poll(self._wait()):
                if descriptor in self._delays_ns:
                    self._take(descriptor)
                elif descriptor == self._timer.descriptor:
                    self._timer.clear()
                elif descriptor == sys.stdin.fileno() and not self._obey():
                    return

    def _wait(self) -> int | None:
        """Returns 0 while a packet is nearly due; else sets the timer, which wakes the poll."""
        if not self._on_the_way:
            return None
        early_ns = self._on_the_way[0][0] - _EARLY_NS
        if early_ns <= time.monotonic_ns():
            return 0
        self._timer.set(early_ns)
        return None

    def _take(self, tun: int) -> None:
        """Reads a host's packets; the delay of a packet begins when it is read."""
        for _ in range(_BURST):
            try:
                packet = os.read(tun, 65535)
            except BlockingIOError:
                return
            target = self._tuns.get(packet[16:20])
            if target is None:
                continue
            delay_ns = self._delays_ns[tun]
            if delay_ns == 0:
                _send(target, packet)
            else:
                heapq.heappush(self._on_the_way, (time.monotonic_ns() + delay_ns, next(self._numbers), target, packet))

    def _deliver(self) -> None:
        while self._on_the_way and self._on_the_way[0][0] <= time.monotonic_ns():
            _, _, target, packet = heapq.heappop(self._on_the_way)
            _send(target, packet)

    def _obey(self) -> bool:
        lines = os.read(sys.stdin.fileno(), 65536).decode()
        for line in lines.splitlines():
            address, seconds = line.split()
            self._delays_ns[self._tuns[_packed(address)]] = max(0, round(float(seconds) * 1e9) - _OWN_NS)
            print("ok", flush=True)
        return lines != ""


def _send(tun: int, packet: bytes) -> None:
    with suppress(OSError):  # a device that is down or whose queue is full drops it, as a cable does
        os.write(tun, packet)


def _packed(address: str) -> bytes:
    return ipaddress.IPv4Interface(address).ip.packed


def main() -> None:
    hosts = [argument.partition("=") for argument in sys.argv[1:]]
    tuns = {_packed(address): open_tun(namespace, address) for namespace, _, address in hosts}
    with suppress(PermissionError):  # real-time priority, or waits for a CPU would lengthen every delay
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    print("up", flush=True)
    Switch(tuns).forward()


if __name__ == "__main__":
    main()
