"""Finds the type of a path's file system, and whether the file system is remote."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_REMOTE = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "vboxsf", "fuse", "afs", "coda", "ncpfs"}
    | {"ceph", "lustre", "glusterfs", "beegfs", "gpfs", "gfs2", "ocfs2", "orangefs", "pvfs2"}
)
"""Types of remote file systems. FUSE counts as remote because its process may do anything. `fuseblk` is local."""


def is_remote(path: Path) -> bool:
    """Returns True if other machines may use the file system too, or if its type is unknown."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
    except OSError:
        return True
    kind = file_system(path.resolve(), mounts.splitlines())
    return kind.partition(".")[0] in _REMOTE or not kind


def file_system(path: Path, mounts: Iterable[str]) -> str:
    """Returns the type of a path's file system, such as "fuse.sshfs". `mounts` has the lines of /proc/PID/mountinfo."""
    depth, kind = 0, ""
    for line in mounts:
        before, _, after = line.partition(" - ")
        point = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), before.split()[4]))
        if path.is_relative_to(point) and len(point.parts) >= depth:  # A later mount hides an earlier one.
            depth, kind = len(point.parts), after.split()[0]
    return kind
