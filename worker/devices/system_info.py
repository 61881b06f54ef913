"""The operating system's figures for this machine and process. Only Linux provides all of them."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
from pathlib import Path

from llamaclust.core.cgroups import memory_groups, read_text
from llamaclust.core.sizes import MIB

LOADING_BYTES = 16 * MIB
"""Maximum number of bytes that loading a stage takes for modules, threads and metadata. 6 to 15 MiB were measured."""

_ROOT = Path("/")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def total_memory_bytes(root: Path = _ROOT) -> int:
    """Returns the machine's memory, or the limit of this process's control groups if that is smaller."""
    machine = os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES
    return min([machine, *(group.limit_bytes for group in memory_groups(root))])


def available_memory_bytes(root: Path = _ROOT) -> int:
    """Returns the bytes that can be allocated without swapping. Mapped files count as used, unlike in MemAvailable."""
    figures = _figures(root / "proc/meminfo")
    available = figures.get("MemAvailable", os.sysconf("SC_AVPHYS_PAGES") * _PAGE_BYTES)
    mapped = max(
        _figures(root / "proc/self/status").get("RssFile", 0), figures.get("Mapped", 0) - figures.get("Shmem", 0)
    )
    return max(0, min([available - mapped, *(group.free_bytes for group in memory_groups(root))]))


def _figures(path: Path) -> dict[str, int]:
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", read_text(path), re.MULTILINE)}


def memory_group(root: Path = _ROOT) -> str:
    """Returns an id of the control group with the least free memory, or "" if no group limits this process."""
    tightest = min(memory_groups(root), key=lambda group: group.free_bytes, default=None)
    if tightest is None:
        return ""
    found = tightest.path.stat()
    return f"{found.st_dev}:{found.st_ino}"


def resident_bytes() -> int:
    text = read_text(Path("/proc/self/statm"))
    return int(text.split()[1]) * _PAGE_BYTES if text else 0


def release_freed_memory() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))


def processor_name() -> str:
    for line in read_text(Path("/proc/cpuinfo")).splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def log_place() -> str:
    try:
        target = Path("/proc/self/fd/2").readlink()
    except OSError:
        return "its standard error"
    if target.is_file():
        return str(target)
    group = Path(read_text(Path("/proc/self/cgroup")).strip().rpartition("0::")[2])
    if target.name.startswith("socket:") and group.suffix == ".service":
        return f"`journalctl{' --user' if 'user.slice' in group.parts else ''} -u {group.name}`"
    return "its standard error"
