"""This machine: its identity, its processes, and the time since boot."""

from __future__ import annotations

import socket
import time
from functools import cache
from pathlib import Path

_START = 19
"""Index of the process's start time in the result of `process_fields`. It is field 22 of /proc/PID/stat."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@cache
def machine_id() -> str:
    """Returns Linux's boot id, or else the host name. A reboot changes the boot id. Host names may not be unique."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return socket.gethostname()


def boot_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def process_fields(pid: int | str) -> list[str]:
    """Returns the fields of /proc/PID/stat that follow the process's name, or [] if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return []


def start_ticks(pid: int) -> int | None:
    """Returns a process's start time in ticks since boot, or None if it has ended. The time tells reused pids apart."""
    fields = process_fields(pid)
    return int(fields[_START]) if fields else None
