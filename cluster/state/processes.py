"""Processes known by pid and start time: the kernel gives the pid of one that has ended to another."""

from __future__ import annotations

import os
from pathlib import Path

_AFTER_NAME = 19
"""Field 22 of /proc/PID/stat, counted from the third: the second, the name, may hold anything."""


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks after the boot; None where there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[_AFTER_NAME])
    except (OSError, IndexError, ValueError):
        return None


def own_start_ticks() -> int:
    ticks = start_ticks(os.getpid())
    assert ticks is not None
    return ticks
