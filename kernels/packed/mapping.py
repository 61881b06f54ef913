"""Which files of the cache may be mapped, and which maps are quick."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from llamaclust.kernels._native import Memory

_REMOTE = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "vboxsf", "fuse", "afs", "coda", "ncpfs"}
    | {"ceph", "lustre", "glusterfs", "beegfs", "gpfs", "gfs2", "ocfs2", "orangefs", "pvfs2"}
)
"""FUSE is among them, as what its process does with a file is not known, but for block devices (`fuseblk`)."""

_HUGE_PAGE_BYTES = 1 << 21


def is_remote(path: Path) -> bool:
    """Whether it is on a remote file system, also if the system does not report that: reading a map of a remote file
    crashes if its server goes away."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    except OSError:
        return True
    kind = file_system(path.resolve(), mounts.splitlines())
    return kind.partition(".")[0] in _REMOTE or not kind


def file_system(path: Path, mounts: Iterable[str]) -> str:
    """Type of what a path without links lies on, such as "fuse.sshfs", by the lines of /proc/PID/mountinfo."""
    depth, kind = 0, ""
    for line in mounts:
        before, _, after = line.partition(" - ")
        point = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4]))
        if path.is_relative_to(point) and len(point.parts) >= depth:  # what is mounted later lies over it
            depth, kind = len(point.parts), after.split()[0]
    return kind


def in_huge_pages(memories: Sequence[Memory]) -> list[bool]:
    """Which maps are in huge pages; all, if the system has none. Without them weights stream 6 to 8 % slower."""
    if _no_huge_pages():
        return [True] * len(memories)
    try:
        huge_bytes = dict(_huge_bytes(Path("/proc/self/smaps").read_text().splitlines()))
    except OSError:
        return [False] * len(memories)
    return [
        huge_bytes.get(memory.address, 0) >= 0.9 * (memory.bytes // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES)
        for memory in memories
    ]


def _no_huge_pages() -> bool:
    """Whether huge pages are disabled."""
    try:
        return "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return True


def _huge_bytes(lines: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Address and bytes in huge pages of the maps of files that /proc/PID/smaps lists."""
    address = 0
    for line in lines:
        if begin := re.match(r"([0-9a-f]+)-[0-9a-f]+ ", line):
            address = int(begin[1], 16)
        elif line.startswith(("FilePmdMapped:", "ShmemPmdMapped:")) and (size := int(line.split()[1])):
            yield address, size * 1024
