"""What the operating system says about this machine and this process. Linux first; elsewhere less is known."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def total_memory_bytes() -> int:
    """Of the machine, or of the control group that this process is confined to."""
    machine = os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES
    confined = _group_number("memory.max")
    return machine if confined is None else min(machine, confined)


def available_memory_bytes() -> int:
    """What may still be taken without swapping: the kernel's own estimate, less in a confined control group."""
    found = re.search(r"^MemAvailable: +(\d+) kB$", _read(Path("/proc/meminfo")), re.MULTILINE)
    available = int(found[1]) * 1024 if found else os.sysconf("SC_AVPHYS_PAGES") * _PAGE_BYTES
    most, used = _group_number("memory.max"), _group_number("memory.current")
    return available if most is None or used is None else max(0, min(available, most - used))


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    text = _read(Path("/proc/self/statm"))
    return int(text.split()[1]) * _PAGE_BYTES if text else 0


def processor_name() -> str:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def log_place() -> str:
    """Where people find what this process writes to standard error."""
    try:
        target = Path("/proc/self/fd/2").readlink()
    except OSError:
        return "its standard error"
    if target.is_file():
        return str(target)
    group = Path(_read(Path("/proc/self/cgroup")).strip().rpartition("0::")[2])
    if target.name.startswith("socket:") and group.suffix == ".service":
        return f"`journalctl{' --user' if 'user.slice' in group.parts else ''} -u {group.name}`"
    return "its standard error"


def _group_number(name: str) -> int | None:
    """Of this process's control group (version 2); None where there is none, or no limit."""
    group = _read(Path("/proc/self/cgroup")).strip().rpartition("0::/")[2]
    text = _read(Path("/sys/fs/cgroup") / group / name).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
