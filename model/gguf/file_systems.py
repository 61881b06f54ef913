"""File systems: which ones are remote."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

_REMOTE = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "virtiofs", "vboxsf", "fuse", "afs", "coda", "ncpfs"}
    | {"ceph", "lustre", "glusterfs", "beegfs", "gpfs", "gfs2", "ocfs2", "orangefs", "pvfs2"}
)
"""FUSE is among them, as what its process does with a file is not known, but for block devices (`fuseblk`)."""


def is_remote(path: Path) -> bool:
    """Returns whether it is on a remote file system, which other machines may have too; True if the system does not
    tell."""
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
