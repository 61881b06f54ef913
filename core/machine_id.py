"""The identity of the machine that this process runs on."""

from __future__ import annotations

import socket
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def machine_id() -> str:
    """Equal in all processes of a running kernel; host names may be equal on several machines."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return socket.gethostname()
