"""This machine: its IPv4 addresses, and its identity."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from pathlib import Path

from llamaclust.core.addresses import ANYWHERE

_GET_ADDRESS = 0x8915
"""SIOCGIFADDR (Linux)."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def own_addresses() -> list[str]:
    """Of its interfaces, those that others may reach first."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, interface in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(probe, _GET_ADDRESS, struct.pack("256s", interface.encode()))
                found.append(socket.inet_ntoa(answer[20:24]))
    return sorted(found, key=lambda address: address.startswith("127."))


def reachable_host(host: str) -> str:
    """Where other machines reach a listener at `host`: for one at all addresses, the first of these."""
    return next(iter(own_addresses()), host) if host in ANYWHERE else host


def machine_id() -> str:
    """Equal in all processes of a running kernel; host names may be equal on several machines."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return socket.gethostname()
