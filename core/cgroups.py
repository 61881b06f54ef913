"""Resource limits that control groups set for this process (cgroup versions 1 and 2). Ancestors' limits count too."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_ROOT = Path("/")
_UNLIMITED_BYTES = 1 << 60
"""A limit of this size or more counts as no limit. cgroup version 1 reports a number near 2^63 for no limit."""


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A control group with a memory limit. `used_bytes` includes mapped files, but not the rest of the page cache."""

    path: Path
    limit_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        return max(0, self.limit_bytes - self.used_bytes)


def memory_groups(root: Path = _ROOT) -> list[MemoryGroup]:
    """Returns the control groups that limit this process's memory, innermost first. `root` contains proc and sys."""
    version_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_{}_file", "total_mapped_file")
    version_2 = ("memory.max", "memory.current", "{}_file", "file_mapped")
    groups = []
    for folder, version in _folders(root, "memory"):
        limit_file, usage_file, of_list, mapped = version_1 if version == 1 else version_2
        limit, usage = (read_text(folder / file).strip() for file in (limit_file, usage_file))
        if not (limit.isdigit() and usage.isdigit()) or int(limit) >= _UNLIMITED_BYTES:
            continue
        pairs = re.findall(r"^(\w+) (\d+)$", read_text(folder / "memory.stat"), re.MULTILINE)
        figures = {name: int(number) for name, number in pairs}
        cached = sum(figures.get(of_list.format(kind), 0) for kind in ("inactive", "active")) - figures.get(mapped, 0)
        groups.append(MemoryGroup(folder, int(limit), int(usage) - max(0, cached)))
    return groups


def cpu_quota(root: Path = _ROOT) -> float | None:
    """Returns the number of CPUs that control groups allow this process to use, or None without a limit."""
    quotas = []
    for folder, version in _folders(root, "cpu"):
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if version == 1 else ("cpu.max",)
        figures = " ".join(read_text(folder / file) for file in files).split()
        # Without a limit, the first figure is "max" or -1.
        if len(figures) == 2 and all(figure.isdigit() for figure in figures):
            quotas.append(int(figures[0]) / int(figures[1]))
    return min(quotas, default=None)


def _folders(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """Yields (folder, cgroup version) for this process's group and its ancestors, innermost first."""
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        names = [name for name in path.split("/") if name]
        for depth in range(0 if ".." in names else len(names), -1, -1):
            yield mount.joinpath(*names[:depth]), 1 if controllers else 2


@cache
def is_memory_limited() -> bool:
    return bool(memory_groups())


def drop_cached_pages(descriptor: int, offset: int = 0, n_bytes: int = 0) -> None:
    """Drops `n_bytes` bytes (0: all the rest) of a file from the page cache if a control group limits memory."""
    if is_memory_limited():
        os.posix_fadvise(descriptor, offset, n_bytes, os.POSIX_FADV_DONTNEED)


def read_text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
